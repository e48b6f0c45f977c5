"""The models under torch.compile: one graph, the same numbers, the ids still checked."""

import pytest
import torch

from fastmtl import backend as backends
from fastmtl.basic.batch import ColumnBatch
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import BadIdError
from fastmtl.models import MMOE


def in_front_of_batch_norm(name: str) -> bool:
    """Whether ``name`` is the bias of a linear layer that a batch normalisation follows."""
    layer = name.rsplit(".", 2)[-2]
    last = {"towers.0": "4", "towers.1": "4"}.get(".".join(name.split(".")[:2]))
    return name.endswith(".bias") and int(layer) % 4 == 0 and layer != last


@pytest.mark.parametrize("as_columns", [False, True])
def test_full_graph(as_columns, seed):
    torch.manual_seed(seed)
    torch._dynamo.reset()
    features = [
        SparseFeature("a", 10, 4),
        DenseFeature("d"),
        SequenceFeature("s", 7, 4, padding_idx=0),
        SparseFeature("b", 5, 8, oov="zero"),
    ]
    model = MMOE(features, ["classification", "regression"], 3, {"dims": [6, 5]}, [{"dims": [4]}, {"dims": [3]}])
    x = {
        "a": torch.randint(0, 10, (32,)),
        "d": torch.randn(32),
        "s": torch.randint(-1, 7, (32, 6)),
        "b": torch.randint(-2, 8, (32,)),
    }
    batch = ColumnBatch.from_columns(x) if as_columns else x
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model.eval()(x)
    torch.testing.assert_close(compiled(batch), expected, rtol=1e-5, atol=1e-6)
    model.train()
    compiled(batch).sum().backward()
    gradients = {name: gradient.clone() for name, gradient in model.named_gradients()}
    model.zero_grad()
    with backends.use_backend("eager"):
        model(x).sum().backward()
    for name, gradient in model.named_gradients():
        if not in_front_of_batch_norm(name):  # their true gradient is zero: what is there is round-off
            error = (gradients[name] - gradient).abs().max()
            assert error <= 1e-3 * gradient.abs().max() + 1e-6, name
    x["a"][3] = 11
    with pytest.raises(BadIdError, match="feature 'a': id 11 in row 3"):
        compiled(ColumnBatch.from_columns(x) if as_columns else x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_first_call_of_a_new_model_is_one_graph(dtype, seed):
    """With ids of 32 bits, as they lie on a device, too."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    features = [SparseFeature("a", 10, 4), SequenceFeature("s", 7, 4, padding_idx=0), DenseFeature("d")]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6]}, [{"dims": [4]}] * 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (16, 9, 12):  # from the second size on the number of rows is a variable
        x = {
            "d": torch.randn(n),
            "a": torch.randint(0, 10, (n,), dtype=dtype),
            "s": torch.randint(-1, 7, (n, 3), dtype=dtype),
        }
        batch = ColumnBatch.from_columns(x)
        found = compiled(batch)
        with backends.use_backend("eager"):
            torch.testing.assert_close(found, model(batch), rtol=1e-5, atol=1e-6)


def test_one_graph_serves_ordinary_calls_between(seed):
    """What the layer keeps of a batch's layout when nobody watches is nothing that a graph depends on."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    features = [SparseFeature("a", 10, 4), SparseFeature("b", 5, 4), DenseFeature("d")]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6]}, [{"dims": [4]}] * 2)
    columns = {"b": torch.randint(0, 5, (16,)), "c": torch.randint(0, 3, (16,)), "a": torch.randint(0, 10, (16,))}
    batch = ColumnBatch.from_columns({**columns, "d": torch.randn(16)})  # b and a by number, not in the data's order
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [compiled(batch)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        expected = model(batch)
        found.append(compiled(batch))
    assert len(model.embedding.pieces_in_use()) == 1
    for predictions in found:
        torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_is_no_exported_one(seed):
    """An exported graph leaves ids outside their tables to its runtime: a GPU would be lost to the process."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    features = [SparseFeature("a", 10, 4), SparseFeature("b", 5, 4)]
    model = MMOE(features, ["classification"], 2, {"dims": [6]}, [{"dims": [4]}])
    x = {"a": torch.randint(0, 10, (16,)), "b": torch.randint(0, 5, (16,))}
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=note)(x)
    assert any("embedding_rows" in name for name in seen), seen
    exported = [str(node.target) for node in torch.export.export(model.eval(), (x,)).graph.nodes]
    assert not any("embedding_rows" in name for name in exported), exported


def test_no_cuda_graph_is_made_of_the_check():
    """torch.compile(mode="reduce-overhead") leaves out what has this mark; it would fail otherwise."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.fastmtl.embedding_rows.default.tags
