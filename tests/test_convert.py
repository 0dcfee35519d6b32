"""Files of other projects are read without running code, or refused before anything is written."""

import io
import json
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.exchange import layouts, tensors
from hjepa_jax.exchange.convert import convert
from hjepa_jax.exchange.resample import resample
from hjepa_jax.runs.load import load_encoder

WIDTH, GRID, PATCH = 16, 4, 2


def vit_tensors(width=WIDTH, grid=GRID, **others):
    """Returns the tensors of a vision transformer with one block, in timm's layout."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "blocks.0.norm1.weight": (width,), "blocks.0.norm1.bias": (width,),
        "blocks.0.norm2.weight": (width,), "blocks.0.norm2.bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width), "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (2 * width, width), "blocks.0.mlp.fc1.bias": (2 * width,),
        "blocks.0.mlp.fc2.weight": (width, 2 * width), "blocks.0.mlp.fc2.bias": (width,),
        **others,
    }  # fmt: skip
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if shape
    }


def save(path, found):
    with path.open("wb") as file:
        tensors.write_safetensors(file, found, {})
    return path


def torch_file(path, found, *, reduce=b"ctorch._utils\n_rebuild_tensor_v2\n", numel=None):
    """Writes the format of torch.save, opcode by opcode, because PyTorch may not be installed."""

    def text(value):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value):
        return b"J" + struct.pack("<i", value)

    body = b"\x80\x02}("
    for i, (name, tensor) in enumerate(found.items()):
        shape = b"(" + b"".join(map(number, tensor.shape)) + b"t"
        strides = [s // tensor.itemsize for s in tensor.strides]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(i)) + text("cpu")
        storage += number(tensor.size) + b"tQ"
        arguments = storage + number(0) + shape + b"(" + b"".join(map(number, strides)) + b"t\x89"
        body += text(name) + reduce + b"(" + arguments + b"ccollections\nOrderedDict\n)RtR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body + b"u.")
        for i, tensor in enumerate(found.values()):
            archive.writestr(f"archive/data/{i}", tensor.tobytes()[:numel])
    return path


def test_safetensors_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    found = {
        "b": rng.normal(size=(2, 3)).astype(np.float32),
        "a": rng.normal(size=5).astype(np.float16),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.array(7, np.uint8),
        "bf16": rng.normal(size=3).astype(tensors._TYPES["BF16"]),
    }
    with (tmp_path / "x.safetensors").open("wb") as file:
        tensors.write_safetensors(file, found, {"format": "pt"})
    back, metadata = tensors.read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert back.keys() == found.keys()
    for name, value in found.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


def test_a_torch_file_gives_the_same_tensors_without_pytorch(tmp_path):
    found = vit_tensors()
    file = tensors.read_torch(torch_file(tmp_path / "x.pth", found))
    back = file.tensors(file.content)
    for name, value in found.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.slow
def test_a_converted_encoder_is_a_work_directory(tmp_path):
    found = vit_tensors()
    source = torch_file(tmp_path / "x.pth", {f"module.{n}": t for n, t in found.items()})
    config = convert(source, tmp_path / "run", num_heads=2, data="shapes")
    assert (config.data.image_size, config.model.gelu, config.model.depth) == (8, "erf", 1)
    _, params = load_encoder(tmp_path / "run")
    np.testing.assert_array_equal(params["norm"]["scale"], found["norm.weight"])
    np.testing.assert_allclose(
        params["summary_tokens"], found["cls_token"] + found["pos_embed"][:, :1], rtol=1e-6
    )
    record = json.loads((tmp_path / "run" / "converted.json").read_text())
    assert (record["file"], record["layout"]) == ("x.pth", "timm")
    with pytest.raises(InputError, match="must be a new or empty directory"):
        convert(source, tmp_path / "run", num_heads=2)


def hjepa_tensors():
    """Returns the networks of a PyTorch H-JEPA checkpoint; its target encoder is `vit_tensors`."""
    target = vit_tensors()
    others = {f"context_encoder.vit.{n}": t + 1 for n, t in target.items()}
    heads = ("predictor.blocks.0.norm1.weight", "hierarchy_projections.0.0.weight",
             "fpn_lateral_convs.0.1.bias", "predictor.mask_token")  # fmt: skip
    others |= {name: np.ones(WIDTH, np.float32) for name in heads}
    return others | {f"target_encoder.vit.{n}": t for n, t in target.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_the_target_encoder_of_a_pytorch_hjepa_is_taken(prefix):
    found = {prefix + name: tensor for name, tensor in hjepa_tensors().items()}
    params, sizes = layouts.to_here(found, layouts.choose_layout({*found}))
    expected, expected_sizes = layouts.to_here(vit_tensors(), layouts.TIMM)
    assert sizes == expected_sizes
    jax.tree.map(np.testing.assert_array_equal, params, expected)


class Bomb:
    """Unpickling this object creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def header(path, text, data=b""):
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def other_bytes(path):
    content = bytearray(path.read_bytes())
    content[-400 - len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def archive(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
    return path


def pickle_bomb(path):
    return archive(path, pickle.dumps({"model": Bomb(path.with_name("exploded"))}, protocol=2))


def entry(shape, start, end):
    fields = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return json.dumps({"x": fields}).encode()


UNUSABLE = {
    "no file": (lambda p: p, "there is no such file"),
    "empty": (lambda p: header(p, b""), "its header would have 0 bytes"),
    "short": (lambda p: cut(save(p, vit_tensors()), -4), "bytes by its header|by its header"),
    "header cut": (lambda p: cut(save(p, vit_tensors()), 100), "its header would have"),
    "header no JSON": (lambda p: header(p, b"{]"), "Expecting|property name"),
    "header a list": (lambda p: header(p, b"[1]"), "its header is malformed"),
    "deep header": (lambda p: header(p, b"[" * 100_000), "its header is malformed"),
    "overlap": (lambda p: header(p, entry([1], 4, 8), b"\0" * 8), "x has no place of its own"),
    "too small": (lambda p: header(p, entry([9], 0, 4), b"\0" * 4), "x has no place of its own"),
    "negative": (lambda p: header(p, entry([-1], 0, -4), b""), "x has no place of its own"),
    "huge": (lambda p: header(p, entry([2**60], 0, 2**62), b""), "by its header"),
    "wrong names": (lambda p: save(p, {"x": np.zeros(3, np.float32)}), "no vision transformer"),
    "lacks": (lambda p: save(p, vit_tensors(**{"norm.bias": None})), "it lacks norm.bias"),
    "more": (lambda p: save(p, vit_tensors(**{"norm_pre.bias": (3,)})), "also has norm_pre.bias"),
    "shape": (
        lambda p: save(p, vit_tensors(**{"norm.bias": (3,)})),
        r"another architecture: norm/bias is \(3,\), not \(16,\)",
    ),
    "grey": (
        lambda p: save(p, vit_tensors(**{"patch_embed.proj.weight": (WIDTH, 1, 2, 2)})),
        r"is \(16, 1, 2, 2\), not \[width, 3, P, P\]",
    ),
    "grid": (lambda p: save(p, vit_tensors(pos_embed=(1, 19, WIDTH))), "no square grid"),
    "two encoders": (
        lambda p: save(p, {f"{k}.{n}": t for n, t in vit_tensors().items() for k in "ab"}),
        r"it holds several encoders: a\., b\.",
    ),
    "rotary": (
        lambda p: save(p, hjepa_tensors() | {
            "target_encoder.vit.blocks.0.attn.attn.proj.bias": np.ones(WIDTH, np.float32)
        }),
        "it has rotary positions beside its learned ones",
    ),
    "nan": (
        lambda p: save(p, vit_tensors() | {"norm.bias": np.full(WIDTH, np.nan, np.float32)}),
        "norm/bias has numbers that are not finite",
    ),
}  # fmt: skip
UNUSABLE_TORCH = {
    "bomb": (pickle_bomb, r"names \w+.open, and only tensors are read"),
    "bomb beside numbers": (
        lambda p: archive(p, pickle.dumps({"best": np.float64(1), "x": Bomb(p)}, protocol=2)),
        r"names \w+.open, and only tensors are read",
    ),
    "numbers alone": (
        lambda p: archive(p, pickle.dumps({"best": np.float64(1)}, protocol=2)),
        "it is no vision transformer",
    ),
    "system": (
        lambda p: torch_file(p, vit_tensors(), reduce=b"cos\nsystem\n"), "it names os.system"
    ),
    "no archive": (lambda p: header(p, b"x" * 50), "no whole archive of torch.save"),
    "archive cut": (lambda p: cut(torch_file(p, vit_tensors()), -9), "no whole archive"),
    "storage short": (
        lambda p: torch_file(p, vit_tensors(), numel=4), "does not lie within its storage"
    ),
    "bit flipped": (lambda p: other_bytes(torch_file(p, vit_tensors())), "cannot be read|Bad CRC"),
    "compressed": (
        lambda p: archive(p, b"\0" * 10_000_000, zipfile.ZIP_DEFLATED), "no archive of torch.save"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [("x.safetensors", case) for case in UNUSABLE] + [("x.pth.tar", c) for c in UNUSABLE_TORCH],
)
def test_an_unusable_file_is_refused_by_name_and_nothing_is_written(name, case, tmp_path):
    make, rule = (UNUSABLE | UNUSABLE_TORCH)[case]
    path = make(tmp_path / name)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=rf"(?s)^--input='.*{name}': .*({rule})"):
        convert(path, tmp_path / "run", num_heads=2)
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "its config.json is no JSON"), ("[]", "its config.json is no JSON object"),
        ('{"hidden_size": 32}', "its config.json has hidden_size 32, its tensors 16"),
        ('{"hidden_act": "silu"}', "its activation is 'silu'"),
        ("{}", "heads at width 16 is not known: --num_heads"),
    ],
)  # fmt: skip
def test_a_config_of_another_encoder_is_refused(text, rule, tmp_path):
    save(tmp_path / "x.safetensors", vit_tensors())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=rule):
        convert(tmp_path, tmp_path / "run", num_heads=None if text == "{}" else 2)


def test_a_torch_pickle_cannot_reach_what_is_behind_a_known_name(tmp_path):
    reader = tensors._Reader(io.BytesIO())
    for name in ("OrderedDict.__init__", "defaultdict", "_sys"):
        with pytest.raises(ValueError, match=f"it names collections.{name}"):
            reader.find_class("collections", name)


def test_an_encoder_in_another_layout_and_back_is_the_same():
    params, sizes = layouts.to_here(vit_tensors(), layouts.TIMM)
    for layout in (layouts.TIMM, layouts.VIT, layouts.DINOV2):
        back, _ = layouts.to_here(layouts.to_there(params, layout, sizes.depth), layout)
        assert back.keys() == params.keys()
        for name, value in params.items():
            np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("channels", [1, 13])
def test_patches_of_any_number_of_channels_become_a_convolution(channels):
    params, sizes = layouts.to_here(vit_tensors(), layouts.TIMM)
    width = params["patch_embedding/bias"].size
    kernel = np.arange(16 * channels * width, dtype=np.float32).reshape(-1, width)
    there = layouts.to_there(
        params | {"patch_embedding/kernel": kernel}, layouts.TIMM, sizes.depth,
        num_channels=channels,
    )  # fmt: skip
    found = there[f"{layouts.TIMM.patch}.weight"]
    assert found.shape == (width, channels, 4, 4)
    pixel = (2 * 4 + 1) * channels + channels - 1  # row 2, column 1, last channel
    np.testing.assert_array_equal(found[:, -1, 2, 1], kernel[pixel])


@pytest.mark.parametrize("antialias", [False, True])
def test_resampling_keeps_constants(antialias):
    rows, _ = np.mgrid[:6, :6]
    table = np.stack([np.ones(36), rows.ravel()], axis=1).astype(np.float32)
    found = resample(table, 12, antialias=antialias).reshape(12, 12, 2)
    np.testing.assert_allclose(found[..., 0], 1, rtol=1e-6)
    # Cubic interpolation with a = -0.75, as in PyTorch, does not preserve linear functions.
    expected = [1.75, 2.25, 2.75, 3.25] if antialias else [1.703125, 2.296875, 2.703125, 3.296875]
    np.testing.assert_allclose(found[4:8, 3, 1], expected, atol=1e-6)
    assert resample(table, 6, antialias=antialias) is table


@pytest.mark.slow
def test_the_commands_work_on_a_converted_encoder(run_module, shapes_npz, tmp_path):
    """Converts, probes, fine-tunes, reports, embeds and exports, as for a trained run."""
    source = save(tmp_path / "x.safetensors", vit_tensors())
    workdir = f"--workdir={tmp_path / 'run'}"
    for command in (
        ("convert", f"--input={source}", "--num_heads=2", f"--data={shapes_npz}"),
        ("probe", "--protocols=knn,finetune", "--encoders=target", "--finetune_epochs=1"),
        ("report",),
        ("embed", f"--input={shapes_npz.removeprefix('npz:')}", f"--output={tmp_path / 'x.npy'}"),
        ("export", f"--output={tmp_path / 'out'}", "--format=timm"),
    ):
        done = run_module(f"hjepa_jax.{command[0]}", workdir, *command[1:])
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "probe.json").read_text())["results"]
    assert {(row["protocol"], row["encoder"]) for row in rows} >= {("finetune", "target")}
    assert (tmp_path / "run" / "report.html").exists()
    assert np.load(tmp_path / "x.npy").shape == (300, 3 * WIDTH)
