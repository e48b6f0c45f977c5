"""SequenceFeature(pooling="max") through a model: the same training on every backend, sparse or dense."""

import pytest
import torch

from fastmtl import backend as backends
from fastmtl.backends import eager, native
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.models import MMOE
from fastmtl.spec import Bag, EmbeddingSpec
from fastmtl.trainers import MTLTrainer


def trained(seed, folder, backend, update):
    torch.manual_seed(seed)
    features = [
        SparseFeature("item", 60, 8),
        SequenceFeature("seen", 60, 8, pooling="max", shared_with="item"),
        SequenceFeature("tags", 20, 4, pooling="max", padding_idx=0),
        DenseFeature("price"),
    ]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [8]}, [{"dims": [4]}] * 2)
    settings = {"lr": 0.1, "momentum": 0.9}
    with backends.use_backend(backend):
        trainer = MTLTrainer(
            model, optimizer_fn=torch.optim.SGD, optimizer_params=settings, embedding_update=update,
            model_path=str(folder), progress=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(6):
            x = {"item": torch.randint(0, 60, (32,), generator=generator), "price": torch.rand(32, generator=generator)}
            x["seen"] = torch.randint(-1, 60, (32, 5), generator=generator)
            x["tags"] = torch.randint(0, 20, (32, 3), generator=generator)
            batches.append((x, torch.randint(0, 2, (32, 2), generator=generator).float()))
        losses = [trainer.train_one_epoch(batches) for _ in range(3)]
        predictions = trainer.predict(model, batches)
    return torch.tensor(losses), model.state_dict(), torch.tensor(predictions)


def test_training_is_the_same_on_every_backend(seed, tmp_path):
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")
    losses, weights, predictions = trained(seed, tmp_path, "eager", "dense")
    for update in ("dense", "exact"):
        own, mine, predicted = trained(seed, tmp_path, "native", update)
        torch.testing.assert_close(predicted, predictions, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own, losses, rtol=1e-4, atol=1e-6)
        for name in ("embedding.embed_dict.item.weight", "embedding.embed_dict.tags.weight"):
            # by the norm: where two of a bag are as large but for rounding, either may have the maximum's gradient
            assert (mine[name] - weights[name]).norm() < 1e-3 * weights[name].norm()
            assert mine[name].abs().max() > 0.01  # it has learned something


def test_the_exported_form_is_the_same(seed):
    spec = EmbeddingSpec((Bag("f", 0, 0, 9, 3, "max", (0, -1)), Bag("g", 0, 0, 9, 3, "max", (), 4)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 3, generator=generator)
    ids = torch.cat([torch.randint(-1, 9, (40, 3), generator=generator), torch.randint(-1, 12, (40, 2))], dim=1)
    ids[0, :3] = 0
    plain = eager.embedding_bag([weight], ids, (0, 3, 5), None, spec)
    assert torch.equal(plain, eager._embedding_bag_exported([weight], ids, (0, 3, 5), None, spec))
    assert not plain[0, :3].any()
