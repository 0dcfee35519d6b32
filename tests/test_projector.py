import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from hjepa_jax.reporting.projector import THUMBNAIL, write_projector


def test_tensorboard_finds_features_classes_and_pictures(tmp_path):
    rng = np.random.default_rng(0)
    features = {"level_0": rng.normal(size=(5, 4)), "summary": rng.normal(size=(5, 8))}
    images = np.zeros((5, 64, 64, 3), np.uint8)
    images[:] = 40 * np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    names = ["cat", "dog", "polar\tbear", "cat", "dog"]
    write_projector(tmp_path, features, names, images)

    config = ProjectorConfig()
    text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), config)
    assert [e.tensor_name for e in config.embeddings] == ["level_0", "summary"]
    for embedding, x in zip(config.embeddings, features.values(), strict=True):
        found = np.fromfile(tmp_path / embedding.tensor_path, "float32")
        np.testing.assert_allclose(found.reshape(embedding.tensor_shape), x, rtol=1e-6)
        labels = (tmp_path / embedding.metadata_path).read_text().splitlines()
        assert labels == ["cat", "dog", "polar bear", "cat", "dog"]
        sheet = np.asarray(Image.open(tmp_path / embedding.sprite.image_path))
        assert list(embedding.sprite.single_image_dim) == [THUMBNAIL, THUMBNAIL]
        assert sheet.shape == (3 * THUMBNAIL, 3 * THUMBNAIL, 3), "5 images need a sheet of 3 x 3"
        corners = sheet[::THUMBNAIL, ::THUMBNAIL, 0].ravel()
        assert corners.tolist() == [40, 80, 120, 160, 200, 0, 0, 0, 0]
