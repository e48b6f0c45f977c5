"""ONNX export against the model, through onnxruntime."""

import numpy as np
import pytest
import torch

from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import ConfigError
from fastmtl.models import AITM, ESMM, MMOE, PLE, SharedBottom
from fastmtl.trainers import MTLTrainer

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: 'fastmtl[onnx]'")

FEATURES = [
    SparseFeature("a", 10, 4),
    DenseFeature("d"),
    DenseFeature("v", 3),
    SequenceFeature("s", 7, 4, padding_idx=0),
    SparseFeature("b", 5, 8, oov="zero"),
    SequenceFeature("c", 9, 4, pooling="concat", max_len=3),
]
TYPES = ["classification", "regression"]
TOWERS = [{"dims": [8]}, {"dims": [8, 3], "activation": "dice"}]
MODELS = {
    "SharedBottom": lambda: SharedBottom(FEATURES, TYPES, {"dims": [16, 7]}, TOWERS),
    "MMOE": lambda: MMOE(FEATURES, TYPES, 5, {"dims": [16, 7]}, TOWERS),
    "PLE": lambda: PLE(FEATURES, TYPES, 2, 2, 1, {"dims": [16, 7]}, TOWERS),
    "ESMM": lambda: ESMM(FEATURES[:3], FEATURES[3:], {"dims": [8]}, {"dims": [8, 4]}),
    "AITM": lambda: AITM(FEATURES, 2, {"dims": [16, 7]}, TOWERS),
}


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_same_predictions(name, dynamo, seed, tmp_path):
    """Any batch size including 1, any sequence length, empty sequences; the model itself is left as it was."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    trainer = MTLTrainer(model, model_path=str(tmp_path))
    path = tmp_path / "deep" / "model.onnx"
    assert trainer.export_onnx(str(path), onnx_export_kwargs=None if dynamo else {"dynamo": False}) is True
    assert model.training
    model.eval()
    session = onnxruntime.InferenceSession(str(path))
    for batch, length in ((1, 5), (3, 1), (64, 10)):
        x = {
            "a": torch.randint(0, 10, (batch,)),
            "d": torch.randn(batch),
            "v": torch.randn(batch, 3),
            "s": torch.randint(-1, 7, (batch, length)),
            "b": torch.randint(-3, 8, (batch,)),
            "c": torch.randint(0, 9, (batch, 3)),
        }
        x["s"][0] = -1
        (out,) = session.run(None, {i.name: x[i.name].numpy() for i in session.get_inputs()})
        with torch.no_grad():
            expected = model(x).numpy()
        # a number near nought is a difference of large ones, in the model as in onnxruntime: both miss by their parts
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def test_arguments_that_export_sets_itself(tmp_path):
    trainer = MTLTrainer(MODELS["MMOE"](), model_path=str(tmp_path))
    with pytest.raises(ConfigError, match="'input_names' is set by export_onnx itself"):
        trainer.export_onnx(str(tmp_path / "m.onnx"), onnx_export_kwargs={"input_names": ["x"]})
