"""The faults that are planted: those that earlier tests did not notice, and others whose numbers look right.

`python -m benchmarks.trust.mutants_planted` prints which of them a test notices, as JSON.
"""

from __future__ import annotations

import json

from benchmarks.trust.mutants_named import Planted, measured

PLANTED = (
    # ---- that no test noticed once --------------------------------------------------------------------------------
    Planted(
        "λ falls where half of the reduction was foreseen, not three quarters",
        "optim/rules.py",
        "1 if rho > 0.75",
        "1 if rho > 0.5",
        "tests/optim/test_rules.py::test_lambda_follows_the_reduction_ratio",
    ),
    Planted(
        "a share of the batch is its first rows, not random ones",
        "optim/quadratic.py",
        "torch.randperm(n, generator=generator, device=generator.device)[",
        "torch.arange(n)[",
        "tests/optim/test_batches_and_shares.py::test_a_share_of_a_batch_is_any_of_its_examples_that_count_each_as_often",
    ),
    Planted(
        "a mean over batches divides by one batch",
        "optim/quadratic.py",
        "summed([sum(examples_of(batch) for batch in self.batches)]",
        "summed([examples_of(self.batches[0])]",
        "tests/optim/test_batches_and_shares.py::test_forms_and_products_are_means_over_the_examples_of_all_batches",
    ),
    Planted(
        "the 2 × 2 system counts as singular far too early",
        "optim/quadratic.py",
        "determinant > 1e-12 *",
        "determinant > 1e-4 *",
        "tests/optim/test_rules.py::test_a_singular_pair_of_directions_leaves_the_first_alone",
    ),
    Planted(
        "the 2 × 2 system never counts as singular",
        "optim/quadratic.py",
        "determinant > 1e-12 *",
        "determinant > 1e-30 *",
        "tests/optim/test_rules.py::test_a_singular_pair_of_directions_leaves_the_first_alone",
    ),
    Planted(
        "labels are drawn anew at every pass",
        "network/vectors.py",
        "if not bool(batch.known[low : low + len(z)].all()):",
        "if True:",
        "tests/exact/test_drawn_labels.py::test_a_likelihood_that_never_draws_the_same_twice_has_one_fisher",
    ),
    Planted(
        "labels of one pass over two batches come from one stream",
        "network/vectors.py",
        "(self.seed + _STRIDE * self._current)",
        "self.seed",
        "tests/exact/test_drawn_labels.py::test_batches_of_the_same_examples_draw_labels_of_their_own",
    ),
    Planted(
        "fingerprints do not mix high bits into low ones",
        "network/guest.py",
        "np.bitwise_xor(part, piece, out=part)",
        "np.copyto(part, piece)",
        "tests/network/test_batches_content.py::test_altered_examples_are_noticed",
    ),
    Planted(
        "fingerprints weigh all words alike",
        "network/guest.py",
        "drawn * 2 + 1",
        "torch.ones_like(drawn)",
        "tests/network/test_batches_content.py::test_altered_examples_are_noticed",
    ),
    Planted(
        "a merged statistic aliases the one that it took",
        "statistics/base.py",
        "self.add(added if other.normalised else added.clone(), other.count)",
        "self.add(added, other.count)",
        "tests/statistics/test_merged_sources.py::test_changing_the_sum_leaves_its_parts_alone",
    ),
    Planted(
        "the nearest Kronecker products keep the singular vectors' random signs",
        "approximations/nearest.py",
        'sign = torch.sign(torch.einsum("kii->k", right))',
        "sign = torch.ones(len(right), dtype=right.dtype)",
        "tests/approximations/test_nearest_definite.py::test_both_factors_of_the_leading_product_are_positive_semidefinite",
    ),
    Planted(
        "Woodbury works in float32 at every damping",
        "statistics/examples.py",
        "ACCURATE = 1e4",
        "ACCURATE = 1e40",
        "tests/exact/test_products_solves.py::test_tiny_damping_in_float32_keeps_the_solution_of_a_vector_in_the_range",
    ),
    Planted(
        "a symmetric product's tiles are mirrored one short",
        "operators/factorise.py",
        "product[..., low:high, :low] = product[..., :low, low:high].mT",
        "product[..., low:high, : low - MIRRORED] = product[..., : low - MIRRORED, low:high].mT",
        "tests/operators/test_precision.py::test_second_moments_are_symmetric",
    ),
    Planted(
        "tiles of a block of two layers replace one another",
        "statistics/products.py",
        "total.addmm_(outputs[:n].flatten(1).T, inputs[:n].flatten(1), beta=float(start > 0))",
        "total.addmm_(outputs[:n].flatten(1).T, inputs[:n].flatten(1), beta=0.0)",
        "tests/statistics/test_tiles.py::test_blocks_between_two_layers",
    ),
    Planted(
        "tiles of a diagonal block replace one another",
        "statistics/products.py",
        "total.addmm_(_half_outputs(g[:, rows]), inputs[:, :n].T, beta=float(start > 0))",
        "total.addmm_(_half_outputs(g[:, rows]), inputs[:, :n].T, beta=0.0)",
        "tests/statistics/test_tiles.py::test_diagonal_blocks",
    ),
    Planted(
        "tiles of an off-diagonal block with weight sharing replace one another",
        "statistics/products.py",
        "total = part if total is None else total.add_(part)",
        "total = part",
        "tests/statistics/test_tiles.py::test_blocks_between_two_layers",
    ),
    Planted(
        "a Gram matrix of many columns loses a strip",
        "statistics/products.py",
        "for low in range(0, d, width):\n            high = min(low + width, d)\n            rows",
        "for low in range(0, d - width, width):\n            high = min(low + width, d)\n            rows",
        "tests/statistics/test_tiles.py::test_gram_matrices_of_many_columns",
    ),
    Planted(
        "tiles of a Frobenius norm count pairs of examples once",
        "statistics/gradients.py",
        "total += 2 * square_sum(pairs) - square_sum(pairs[:, : stop - start])",
        "total += square_sum(pairs)",
        "tests/statistics/test_tiles.py::test_square_norms_of_blocks",
    ),
    Planted(
        "a streamed pass tells every batch that it begins at the first example",
        "exact/products.py",
        "targets[some], first + start\n",
        "targets[some], start\n",
        "tests/exact/test_drawn_labels.py::test_a_likelihood_that_never_draws_the_same_twice_has_one_fisher",
    ),
    Planted(
        "a pass tells every batch that it begins at the first example",
        "exact/run.py",
        "self.vectors, hand, self.witness, self.examples, share)",
        "self.vectors, hand, self.witness, 0, share)",
        "tests/exact/test_kinds.py::test_sampled_labels_are_drawn_once_and_kept",
    ),
    Planted(
        "cumulants of several samples are off by √K",
        "exact/cumulants.py",
        "self.g.sum(0) / len(self.g) ** 0.5",
        "self.g.sum(0)",
        "tests/exact/test_cumulants_of_samples.py::test_several_labels_of_an_example_are_as_many_examples_with_one_label_each",
    ),
    Planted(
        "conjugate gradients stop a hundred times too early",
        "operators/lanczos.py",
        "target = tol * left",
        "target = 100 * tol * left",
        "tests/operators/test_stopping.py::test_the_residual_of_every_column_is_within_the_tolerance",
    ),
    Planted(
        "the rank is not looked at where there is no damping",
        "operators/factorise.py",
        "(floor is not None and not bool(_smallest_eigenvalue(self.factor) > floor))",
        "False",
        "tests/operators/test_precision.py::test_singular_systems_are_refused_and_the_advised_damping_solves_them",
    ),
    Planted(
        "the reduction ratio takes the quadratic term at lr, not lr²",
        "optim/rescaled.py",
        '0.5 * lr**2 * self.last["quadratic"]\n',
        '0.5 * lr * self.last["quadratic"]\n',
        "tests/optim/test_rules.py::test_any_approximation_takes_the_steps_of_algorithm_2",
    ),
    # ---- whose numbers look right ---------------------------------------------------------------------------------
    Planted(
        "K-FAC's π is upside down",
        "operators/damping.py",
        "math.sqrt(size_a) / math.sqrt(size_g)",
        "math.sqrt(size_g) / math.sqrt(size_a)",
        "tests/operators/test_damping.py::test_factors_follow_equation_7",
    ),
    Planted(
        "factored damping adds γ to both factors",
        "operators/damping.py",
        "_shifted(G, self.gamma / pi)",
        "_shifted(G, self.gamma)",
        "tests/operators/test_damping.py::test_factors_follow_equation_7",
    ),
    Planted(
        "the log-determinant of a Kronecker product takes the wrong side's size",
        "operators/kronecker.py",
        "own + len(L_a) * log_determinant_of(L_g)",
        "own + len(L_g) * log_determinant_of(L_g)",
        "tests/operators/test_operators.py::test_inverse_and_solve",
    ),
    Planted(
        "A ⊗ G in the order of the paper, not of the units",
        "operators/kronecker.py",
        "G.contiguous()[:, None, :, None] * A.contiguous()[None, :, None, :]",
        "A.contiguous()[:, None, :, None] * G.contiguous()[None, :, None, :]",
        "tests/operators/test_operators.py::test_shape_and_dense",
    ),
    Planted(
        "a conditional covariance of the chain adds what the next layer explains",
        "operators/tridiagonal.py",
        "symmetric(-psi.G @ cross.G.mT)",
        "symmetric(psi.G @ cross.G.mT)",
        "tests/operators/test_operators.py::test_a_chain_in_another_order_is_its_dense_matrix",
    ),
    Planted(
        "a root of the chain's inverse couples the wrong way",
        "operators/tridiagonal.py",
        "out[i + 1] = parts[i + 1] - psi.T @ parts[i]",
        "out[i + 1] = parts[i + 1] + psi.T @ parts[i]",
        "tests/operators/test_roots.py::test_the_root_of_a_chain_is_made_of_its_conditional_precisions",
    ),
    Planted(
        'an "expand" input factor adds over positions instead of averaging',
        "statistics/moments.py",
        'scale = 1 if self.setting == "sum" or shares is not None else capture.positions',
        "scale = 1",
        "tests/capture/test_embeddings.py",
    ),
    Planted(
        "a moving average weighs the new mean as a sum",
        "statistics/base.py",
        "share = 1.0 if other.normalised else 1 / other.count",
        "share = 1.0",
        "tests/statistics/test_merged_sources.py::test_an_average_is_that_of_the_means_whether_sums_were_normalised_or_not",
    ),
    Planted(
        "Woodbury's log-determinant counts the columns of U twice",
        "statistics/examples.py",
        "(self.examples.size - columns) * math.log(self.damping)",
        "self.examples.size * math.log(self.damping)",
        "tests/exact/test_inverse.py tests/exact/test_natural_gradient.py tests/exact/test_products_solves.py",
    ),
    Planted(
        "samples of the posterior have a prior of the wrong power",
        "exact/posterior.py",
        "weight * y - weight**2 * join",
        "weight * y - weight * join",
        "tests/exact/test_laplace_sampling.py",
    ),
    Planted(
        "the scores of sampled labels are not divided by √samples",
        "network/vectors.py",
        "return self.likelihood.only(torch.stack(scores) / self.samples**0.5, counted)",
        "return self.likelihood.only(torch.stack(scores), counted)",
        "tests/exact/test_kinds.py",
    ),
    Planted(
        "parameters of a layer are gathered in the module's order, not in that of W̄",
        "network/space.py",
        "mine = sorted(self._of[i], key=lambda place: place.columns.start)",
        "mine = self._of[i]",
        "tests/network/test_reordered_structure.py::test_layers_stay_structured_whatever_stands_first",
    ),
    Planted(
        "blocks below the diagonal are left as they are allocated",
        "exact/blocks.py",
        "out[q.flat, p.flat] = out[p.flat, q.flat].T",
        "pass",
        "tests/exact/test_fisher.py",
    ),
    Planted(
        "the eigenvalues of EKFAC come from KFAC's factors in the wrong order",
        "operators/kronecker.py",
        "torch.outer(values_g, values_a)",
        "torch.outer(values_a, values_g).reshape(len(values_g), -1)",
        "tests/operators/test_operators.py",
    ),
)


if __name__ == "__main__":
    print(json.dumps(measured(PLANTED)))
