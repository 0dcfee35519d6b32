"""Published encoders, with random weights, give the same tokens here as in their own library."""

import base64
import collections
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import hjepa_jax
from hjepa_jax.exchange.convert import convert
from hjepa_jax.exchange.export import export
from hjepa_jax.runs.load import load_encoder
from tests.conftest import REPOSITORY
from tests.test_embed import make_run

torch = pytest.importorskip("torch", reason="needs the extra `exchange` (torch)")
with pytest.MonkeyPatch.context() as without_operators:
    # timm imports torchvision, which may be built for another torch. Its operators are not needed.
    ignore = lambda *_, **__: lambda function: function
    without_operators.setattr(torch.library, "register_fake", ignore)
    timm = pytest.importorskip("timm", reason="needs the extra `exchange`")
transformers = pytest.importorskip("transformers", reason="needs the extra `exchange`")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra `exchange`")

pytestmark = pytest.mark.filterwarnings("default")
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def randomize(model):
    """Adds noise to every parameter, because new biases are all 0 and new scales all 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim < 2 else 0.1))
    return model.eval()


def pixels(size):
    return np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)


def encode_here(workdir, images):
    """Returns tokens and summary tokens of the encoder in a work directory."""
    model, params = load_encoder(workdir)
    encode = jax.jit(
        lambda p, x: model.apply({"params": {"context_encoder": p}}, x, method="encode")
    )
    tokens, summary = encode(params, images.transpose(0, 2, 3, 1))
    return np.asarray(tokens), np.asarray(summary)


def check(workdir, images, all_tokens, num_before):
    """Checks the patch tokens, their mean, and the class token (if any) against `all_tokens`."""
    tokens, summary = encode_here(workdir, images)
    expected = all_tokens.detach().numpy()
    np.testing.assert_allclose(tokens, expected[:, num_before:], atol=1e-4)
    np.testing.assert_allclose(tokens.mean(1), expected[:, num_before:].mean(1), atol=1e-4)
    if summary.shape[1]:
        np.testing.assert_allclose(summary[:, 0], expected[:, 0], atol=1e-4)
    assert summary.shape[1] == (num_before > 0)


# Model, its config, grid side in its library and here, number of tokens before the patches.
HUGGING_FACE = {
    "ijepa": ("IJepa", {"intermediate_size": 96, "patch_size": 4}, 14, 14, 0),
    "ijepa to 16x16": ("IJepa", {"intermediate_size": 100, "patch_size": 2}, 14, 16, 0),
    "ijepa to 6x6": ("IJepa", {"intermediate_size": 96, "patch_size": 2}, 14, 6, 0),
    "vit": ("ViT", {"intermediate_size": 64, "patch_size": 2}, 16, 16, 1),
    "vit without biases": (
        "ViT", {"intermediate_size": 64, "patch_size": 4, "qkv_bias": False,
                "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, 14, 16, 1,
    ),
    "dinov2": ("Dinov2", {"mlp_ratio": 2, "patch_size": 2}, 16, 16, 1),
    "dinov2 to 14x14": ("Dinov2", {"mlp_ratio": 2, "patch_size": 2}, 16, 14, 1),
    "registers": ("Dinov2WithRegisters", {"mlp_ratio": 2, "patch_size": 4}, 14, 14, 5),
    "registers to 16x16": ("Dinov2WithRegisters", {"mlp_ratio": 2, "patch_size": 2}, 14, 16, 5),
    "registers to 6x6": ("Dinov2WithRegisters", {"mlp_ratio": 2, "patch_size": 2}, 16, 6, 5),
}  # fmt: skip


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_an_encoder_of_hugging_face_gives_the_same_tokens_here(case, tmp_path):
    name, fields, there, here, num_before = HUGGING_FACE[case]
    size = fields["patch_size"] * here
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **fields, image_size=fields["patch_size"] * there
    )
    model = randomize(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", image_size=size)
    images = pixels(size)
    options = {} if "Dinov2" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(torch.from_numpy(images), **options).last_hidden_state
    check(tmp_path / "ours", images, expected, num_before)


def test_a_classifier_of_hugging_face_is_taken_without_its_head(tmp_path):
    config = transformers.IJepaConfig(**SIZES, intermediate_size=96, image_size=16, patch_size=4)
    model = randomize(transformers.IJepaForImageClassification(config))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    converted = convert(tmp_path / "theirs", tmp_path / "ours")
    assert converted.data.mean == (0.5, 0.5, 0.5)
    assert converted.data.std == (0.25, 0.25, 0.25)
    images = pixels(16)
    with torch.no_grad():
        expected = model.ijepa(torch.from_numpy(images)).last_hidden_state
    check(tmp_path / "ours", images, expected, 0)


MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
TIMM = {
    "class token": ({}, 14, 14, 1),
    "class token to 16x16": ({}, 14, 16, 1),
    "no class token to 6x6": (MEAN, 14, 6, 0),
    "registers": ({"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}, 16, 16, 5),
    "registers with positions": ({"reg_tokens": 2, "init_values": 1.0}, 14, 16, 3),
    "no biases": ({"qkv_bias": False}, 4, 4, 1),
}  # fmt: skip


def timm_model(there, here=None, **fields):
    """Returns a vision transformer of timm; `here` = grid side of its images, None = `there`."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=2 * there, patch_size=2, embed_dim=48, depth=3, num_heads=4, num_classes=3,
        dynamic_img_size=here not in (None, there), **fields,
    )  # fmt: skip
    return randomize(model)


@pytest.mark.parametrize("case", TIMM)
def test_an_encoder_of_timm_gives_the_same_tokens_here(case, tmp_path):
    fields, there, here, num_before = TIMM[case]
    model = timm_model(there, here, **fields)
    safetensors.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    convert(tmp_path / "vit.safetensors", tmp_path / "ours", image_size=2 * here, num_heads=4)
    images = pixels(2 * here)
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(images))
    check(tmp_path / "ours", images, expected, num_before)


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_of_i_jepa_gives_its_target_encoder(half, tmp_path):
    model = timm_model(14, **MEAN)
    if half:
        model = model.bfloat16().float()
    kept = {n: t.bfloat16() if half else t for n, t in model.state_dict().items()}
    target = collections.OrderedDict((f"module.{name}", t) for name, t in kept.items())
    online = collections.OrderedDict((name, torch.zeros_like(t)) for name, t in target.items())
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    checkpoint = {
        "encoder": online, "predictor": online, "target_encoder": target, "opt": optimizer,
        "scaler": None, "epoch": 300, "loss": 0.25, "world_size": 16, "lr": 1e-3,
    }  # fmt: skip
    path = tmp_path / "jepa.pth.tar"
    torch.save(checkpoint, path)
    convert(path, tmp_path / "ours", num_heads=4)
    images = pixels(28)
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(images))
    check(tmp_path / "ours", images, expected, 0)


class Hierarchical(torch.nn.Module):
    """The networks of the PyTorch H-JEPA, with the names that they have in that project."""

    def __init__(self, context, target):
        super().__init__()
        for name, model in (("context_encoder", context), ("target_encoder", target)):
            model.head = torch.nn.Identity()
            setattr(self, name, torch.nn.Module())
            getattr(self, name).vit = model
        layers = [torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.LayerNorm(48))]
        self.hierarchy_projections = torch.nn.ModuleList(layers)
        self.predictor = timm.models.vision_transformer.Block(48, 4)


def test_a_checkpoint_of_the_pytorch_hjepa_gives_its_target_encoder(tmp_path):
    target = timm_model(14)
    model = Hierarchical(timm_model(14), target)
    with torch.no_grad():
        model.context_encoder.vit.pos_embed.add_(1)
    checkpoint = {
        "epoch": 3, "model_state_dict": model.state_dict(), "scheduler_state_dict": None,
        "optimizer_state_dict": torch.optim.AdamW(model.parameters()).state_dict(),
        "metrics": {"val_loss": np.mean([0.5, 0.25])}, "best_metric": np.mean([0.25]),
        "global_step": 8,
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "checkpoint_best.pth")
    convert(tmp_path / "checkpoint_best.pth", tmp_path / "ours", num_heads=4)
    images = pixels(28)
    with torch.no_grad():
        expected = target.eval().forward_features(torch.from_numpy(images))
    check(tmp_path / "ours", images, expected, 1)


EXPORTED = [
    ("timm", {}, 2),
    ("timm", {"model.layer_scale": 0.1, "model.gelu": "erf", "model.num_registers": 0}, 1),
    ("transformers", {}, 2),
    ("transformers", {"model.num_registers": 0, "model.gelu": "erf"}, 1),
    ("transformers", {"model.num_registers": 0, "loss.summary_weight": 0.0,
                      "loss.regularizer": "none", "loss.regularizer_weight": 0.0}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "fields", "num_summaries"), EXPORTED)
def test_an_exported_encoder_gives_the_same_tokens_in_their_library(
    layout, fields, num_summaries, shapes_npz, tmp_path
):
    fields = {"model.num_registers": 1, "model.num_summary_tokens": num_summaries, **fields}
    make_run(tmp_path / "run", shapes_npz, **fields)
    export(tmp_path / "run", tmp_path / "out", layout=layout)
    images = pixels(16)
    with torch.no_grad():
        if layout == "timm":
            model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
            found = model.forward_features(torch.from_numpy(images))
        else:
            model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
            found = model(torch.from_numpy(images)).last_hidden_state
    tokens, summary = encode_here(tmp_path / "run", images)
    num_before = found.shape[1] - tokens.shape[1]
    assert num_before == num_summaries + fields["model.num_registers"]
    np.testing.assert_allclose(found[:, num_before:], tokens, atol=1e-4)
    np.testing.assert_allclose(found[:, :num_summaries], summary, atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rope2d"])
def test_an_onnx_model_gives_the_features_for_any_batch(positions, shapes_npz, tmp_path):
    pytest.importorskip("jax2onnx", reason="needs the extra `onnx`")
    import onnxruntime

    make_run(tmp_path / "run", shapes_npz, **{"model.positions": positions})
    export(tmp_path / "run", tmp_path / "out", layout="onnx")
    program = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    names = [output.name for output in program.get_outputs()]
    images = np.random.default_rng(0).integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    encoder = hjepa_jax.load(tmp_path / "run")
    expected = encoder.embed(images)
    expected["tokens"] = encoder.tokens(images).reshape(5, 16, 16)
    assert {*names} == {*expected}
    for size in (1, 2, 5):
        found = program.run(names, {"images": images[:size]})
        for name, value in zip(names, found, strict=True):
            np.testing.assert_allclose(value, expected[name][:size], atol=1e-4)


class Hub(http.server.BaseHTTPRequestHandler):
    """Accepts uploads like the Hugging Face hub, and stores the files of the last commit."""

    created, files = [], {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        assert self.headers["Authorization"] == "Bearer secret"
        path, address = self.path, f"http://127.0.0.1:{self.server.server_port}"
        if path.endswith("/create"):
            self.created.append(json.loads(body))
            answer = {"url": f"{address}/ada/net"}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]}  # fmt: skip
        elif path.endswith("/validate-yaml"):  # checks the model card
            answer = {"errors": [], "warnings": []}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            answer = {"commitUrl": f"{address}/ada/net/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "ada/net", "sha": "0" * 40, "siblings": []})

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def test_an_exported_folder_is_uploaded_as_it_is(shapes_npz, tmp_path):
    """A server on this machine gets every file. Without a token nothing is exported."""
    make_run(tmp_path / "run", shapes_npz)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hjepa_jax.export", f"--workdir={tmp_path}/run",
               f"--output={out}", "--push=ada/net"]  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        plain = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        plain |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        run = functools.partial(subprocess.run, cwd=REPOSITORY, capture_output=True, text=True)
        refused = run(command, check=False, env=plain)
        assert refused.returncode == 2
        assert "--push='ada/net': needs a token of the hub" in refused.stderr
        assert not out.exists()
        done = run(command, check=False, env={**plain, "HF_TOKEN": "secret"})
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{address}/ada/net"
    created = Hub.created[0]  # the field depends on the package version
    assert created.get("visibility") == "private" or created.get("private")
    assert Hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
