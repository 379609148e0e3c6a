"""What a loader of one's own may return for --data, and what is guessed from it."""

import pytest

from fisherviz.commands.inputs import load_data
from fisherviz.network.batches import Batches


@pytest.mark.parametrize("examples", [2, 5, 7, None])
def test_a_loader_of_the_command_line_may_return_a_list_of_inputs_and_targets(tmp_path, examples):
    """Of a list, the first examples were the inputs alone, or targets were taken for a second batch."""
    (tmp_path / f"pairs_{examples}.py").write_text(
        "import torch\nX, Y = torch.arange(10.0).reshape(5, 2), torch.arange(5) % 3\ndef load():\n    return [X, Y]\n"
    )
    data = load_data(f"{tmp_path}/pairs_{examples}.py:load", examples)
    (inputs, targets), *others = Batches(data.batches)
    assert not others
    assert len(inputs) == len(targets) == min(examples or 5, 5)


def test_true_and_false_are_no_classes(tmp_path):
    (tmp_path / "truths.py").write_text("import torch\ndef load():\n    return torch.zeros(4, 2), torch.ones(4) > 0\n")
    data = load_data(f"{tmp_path / 'truths.py'}:load", None)
    assert data.likelihood_for(None, None)[0] == "bernoulli"
