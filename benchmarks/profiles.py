"""What profiles of one thread say of the goals that are missed, by row; the page has those that its numbers miss."""

WORKLOADS = {
    "W1": "half of the time is the products, at 125 GFLOP/s: they alone are 15 passes of a batch that takes 1.4 ms; "
    "outer products of inputs and gradients and the writing of the matrix in torch order are a fifth each",
    "W2": "half of the time is one product at 115 GFLOP/s; the rest writes a matrix of 100 MB into fresh memory",
    "W2c": "the count is 34 GFLOP where a pass has one, 35 passes at equal rates: 29 for the Gram matrix of the 4,608 "
    "gradients of K = C - 1 vectors (one triangle alone is 25), 4 for the gradients themselves",
    "W3": "the count is 5.0 passes, at the rate of a pass's products",
    "W3m": "the count is 1.12 passes; Gram products run at 100 GFLOP/s where a pass has 125, fingerprints of the "
    "weights (three) and of the data take 8 ms, symmetry bit for bit and the mean 10 ms",
    "W5": "17 ms are products with 129 columns, at 70 GFLOP/s",
    "W5 inverses": "25 ms are the blocks, 20 their Cholesky factors, inverses and the check that they are definite",
    "W6": "the count is 1.64 passes; fingerprints of the weights (two) and of the data take 7 ms, the comparison of "
    "forward with reverse mode 2, fresh memory for the flat result 4",
    "W7": "the count is 2.2 passes; the Cholesky factor in float64 and its solve take 20 ms, fingerprints 7",
    "W7 N=100": "the count is 1.4 passes; two fingerprints of 11 MB of weights are 0.6, three examples shown alone, "
    "the evidence that examples are independent, 0.5, fresh memory for the flat result of as many bytes 0.2",
    "ResNet K-FAC": "the count is less than nngeometry's; more than half of the time is backward, one vector after the "
    "other, and putting its gradients side by side; a quarter is the factors, a tenth unfolding",
}
_CHOLESKY = "seven Cholesky factors of 1000 rows, 7.5 ms each (LAPACK at 45 GFLOP/s), are 2.9 SGD steps"
STEPS = {
    "kfac T=1": f"{_CHOLESKY}; averages and products are the other half",
    "kfac T=100": "two triangular solves for each factor and the averages' rows; the count itself is 2.9",
    "foof T=1": "four Cholesky factors of 1000 rows, 8 ms each (LAPACK at 45 GFLOP/s), are 1.8 SGD steps",
    "foof T=100": "the count itself is 2.0",
}
