"""The whole evaluation protocol, with a random matrix as the encoder."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.config import base_config
from hjepa_jax.data.base import Split
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation import extraction, quality_rows, results
from hjepa_jax.evaluation.feature_cache import FeatureCache
from hjepa_jax.evaluation.features import extract_features, representations
from hjepa_jax.evaluation.known_rows import KnownRows, settings_of
from hjepa_jax.evaluation.protocols import PROTOCOLS, Protocol, evaluate_encoders
from hjepa_jax.runs.scores import (
    read_probe_json,
    rows_to_add_to,
    steps_if_outdated,
    write_probe_json,
)

NUM_CLASSES = 4
ALL = Protocol(protocols=PROTOCOLS, batch_size=64, lowshot_labels=(1, 5))
CHOOSING = ("linear", "knn", "lowshot")
KNN = Protocol(protocols=("knn",), batch_size=40)  # the cheapest protocol


def split(n, seed):
    """Returns n images: one colour per class, plus noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % NUM_CLASSES).astype(np.int32)
    colours = np.random.default_rng(9).integers(60, 200, (NUM_CLASSES, 1, 1, 3))
    images = colours[labels] + rng.normal(0, 40, (n, 4, 4, 3))
    return Split(np.clip(images, 0, 255).astype(np.uint8), labels)


TRAIN, TEST = split(200, 0), split(80, 1)


def embed(params, images):
    flat = images.reshape(len(images), -1) / 255.0
    return {"level_0": flat @ params, "level_1": flat @ params[:, :3], "summary": flat @ params}


def embed_views(params, images, rngs):
    return embed(params, images + 3.0 * (rngs[:, :1] % 7).reshape(-1, 1, 1, 1))


def encoders(seed=2):
    matrix = np.random.default_rng(seed).normal(size=(48, 6)).astype(np.float32)
    return {"target": jnp.asarray(matrix), "random_init": jnp.asarray(matrix[::-1])}


def judge(embed, params, train=TRAIN, test=TEST, **options):
    options = {"num_classes": NUM_CLASSES, "step": 7, "data": "colours"} | options
    return evaluate_encoders(embed, params, train, test, **options)


def evaluate(protocol=ALL, train=TRAIN, test=TEST, params=None, **options):
    params = encoders() if params is None else params
    return judge(embed, params, train, test, protocol=protocol, **options)


@functools.cache
def all_rows():
    return evaluate(embed_views=embed_views)


def test_every_protocol_scores_every_representation():
    rows = all_rows()
    found = {(results.column(r), r["encoder"], r["pool"], r["level"]) for r in rows}
    columns = ["linear", "knn", "quality", "fewshot 1-shot", "fewshot 5-shot"]
    columns += ["lowshot 1 per class", "lowshot 5 per class"]
    places = [("mean", 0), ("mean", 1), ("mean", "all"), ("summary", "all"), ("concat", "all")]
    expected = {(c, e, *p) for c in columns for e in ("target", "random_init") for p in places}
    assert found == expected | {(c, "pixels", "concat", 0) for c in columns}
    assert len(rows) == len(found)
    held_out = {row["settings"]["num_val"] for row in rows if row["protocol"] in CHOOSING}
    assert held_out == {len(TRAIN.labels) // 5}, (
        "a fifth of the images is held out, not the default of 5000"
    )
    for row in rows:
        assert row["step"] == (7 if row["encoder"] == "target" else 0)
        assert (row["train_size"], row["test_size"], row["data"]) == (200, 80, "colours")
    lidar = {row["encoder"]: row.get("lidar") for row in rows if row["protocol"] == "quality"}
    assert lidar["pixels"] is None
    assert 1 <= lidar["target"] <= 19
    json.dumps(rows, allow_nan=False)


def test_no_choice_depends_on_the_test_labels():
    test = Split(TEST.images, np.random.default_rng(5).permutation(TEST.labels))
    true = [row for row in all_rows() if row["protocol"] in CHOOSING]
    false = evaluate(dataclasses.replace(ALL, protocols=CHOOSING), test=test)
    assert [row["chosen"] for row in true] == [row["chosen"] for row in false]
    linear = [[r["top1"] for r in rows if r["protocol"] == "linear"] for rows in (true, false)]
    assert min(linear[0]) > max(linear[1])


def test_levels_and_pools_choose_representations():
    features = extract_features(embed, encoders()["target"], TEST.images, batch_size=32)
    names = lambda **options: [(p, lv) for p, lv, _ in representations(features, **options)]
    assert names(levels=(1, 1)) == [("mean", 1), ("summary", "all"), ("concat", 1)]
    assert names(levels=(1, 0)) == names()
    features["level_2"] = features["level_1"]
    assert ("mean", "0+2") in names(levels=(2, 0))
    del features["level_2"]
    assert names(pools=("summary",)) == [("summary", "all")]
    concat = representations(features, levels=(1,))[-1][2]
    expected = np.concatenate([features["level_1"], features["summary"]], axis=1)
    np.testing.assert_array_equal(concat, expected)
    with pytest.raises(InputError, match=r"^--levels=2: .* 0 to 1"):
        names(levels=(0, 2))
    del features["summary"]
    with pytest.raises(InputError, match=r"^--pools="):
        names(pools=("summary",))


def test_features_are_extracted_once_per_weights_and_images(tmp_path, monkeypatch):
    calls = []

    def spy(fn, params, images, *extra, what="", **options):
        calls.extend([what] if what else [])  # raw pixels are not stored
        return extract_features(fn, params, images, *extra, **options)

    monkeypatch.setattr(extraction, "extract_features", spy)

    def rows(train=TRAIN, seed=2):
        calls.clear()
        return evaluate(KNN, train=train, cache=FeatureCache(tmp_path), params=encoders(seed))

    first = rows()
    assert len(calls) == 4  # two encoders, two splits
    assert rows() == first
    assert not calls
    rows(train=Split(TRAIN.images, TRAIN.labels[::-1].copy()))
    assert not calls, "features do not depend on labels"
    other = rows(seed=3)
    assert len(calls) == 4  # other weights at the same step
    assert [r["top1"] for r in other] == [r["top1"] for r in evaluate(KNN, params=encoders(3))]
    assert len(list(tmp_path.glob("target_train_*"))) == 1, "new features must replace the old file"
    rows(train=split(200, 3), seed=3)
    assert len(calls) == 2  # both encoders, on the new training images


ZERO = np.zeros((), np.float32)


def first_pixels(scale):
    """Returns a function whose source never changes; only the constant `scale` differs."""
    return jax.jit(lambda params, images: {"level_0": images[:, 0, 0] * scale + params})


def test_stored_features_depend_on_program_params_and_images(tmp_path):
    cache, made = FeatureCache(tmp_path), []

    def get(embed, params=ZERO, images=TRAIN.images):
        def make():
            made.append(embed)
            return extract_features(embed, params, images, batch_size=50)

        before = len(made)
        found = cache.get("target_train", make, embed, params, images)["level_0"]
        expected = extract_features(embed, params, images, batch_size=50)["level_0"]
        np.testing.assert_array_equal(found, expected)
        return len(made) > before

    assert get(first_pixels(2.0))
    assert not get(first_pixels(2.0))
    assert get(first_pixels(2.5)), "another constant, such as the normalisation mean"
    large = np.ones((1, 4, 4, 3), np.float32)
    table = lambda values: jax.jit(lambda p, x: {"level_0": (x * values).sum((1, 2)) + p})
    assert get(table(large))
    large[0, 3, 3, 2] = 2.0
    assert get(table(large.copy())), "another entry in a constant table"
    assert get(jax.jit(lambda p, x: {"level_0": x[:, 0, 1] * 2.0 + p})), "other code"
    assert get(first_pixels(2.0))
    assert get(first_pixels(2.0), params=ZERO + 1), "other parameters"
    images = TRAIN.images.copy()
    images[-1, -1, -1, -1] ^= 1
    assert get(first_pixels(2.0), ZERO + 1, images), "another last byte of the images"
    assert not get(first_pixels(2.0), ZERO + 1, TRAIN.images.copy())


def test_a_broken_cache_file_is_replaced(tmp_path):
    cache, embed = FeatureCache(tmp_path), first_pixels(2.0)
    make = lambda: {"level_0": np.ones((200, 2), np.float32)}
    get = lambda: cache.get("target_train", make, embed, ZERO, TRAIN.images)["level_0"]
    get()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    np.testing.assert_array_equal(get(), 1.0)


ROW = {
    "protocol": "linear", "encoder": "target", "step": 1, "pool": "mean", "level": 0, "dim": 8,
    "data": "shapes", "top1": 0.5, "chosen": {"val_top1": 0.5},
}  # fmt: skip


def test_rows_on_changed_images_are_stored_but_not_shown(tmp_path):
    path, images = tmp_path / "probe.json", lambda name: {"data_fingerprint": name}
    old = [ROW | images("all-1"), ROW | images("all-1") | {"protocol": "knn"}]
    elsewhere, new = ROW | images("all-9") | {"data": "npz:b"}, ROW | images("all-2")
    write_probe_json(path, [*old, elsewhere])
    assert read_probe_json(path) == [*old, elsewhere]
    write_probe_json(path, [new])
    assert read_probe_json(path) == [elsewhere, new]
    assert rows_to_add_to(path) == [*old, elsewhere, new]
    write_probe_json(path, [old[0]])  # the old images are back
    assert read_probe_json(path) == [*old, elsewhere]


def test_scores_are_outdated_if_the_run_has_trained_on():
    rows = [ROW | {"step": 4}, ROW | {"step": 6, "encoder": "online"}, ROW | {"step": 2}]
    assert steps_if_outdated(rows, "linear", 8) == "step 4 of 8"
    assert steps_if_outdated(rows, "linear", 4) == ""
    assert steps_if_outdated(rows, "knn", 8) == ""


def test_constant_encoder_gets_a_verdict_and_no_crash():
    constant = lambda params, images: {"level_0": jnp.ones((len(images), 5))}
    rows = judge(constant, {"target": None}, protocol=ALL)
    verdicts = {r["encoder"]: r["verdict"] for r in rows if r["protocol"] == "quality"}
    assert verdicts == {"target": "collapse", "pixels": "healthy"}
    chance = [r["top1"] for r in rows if r["encoder"] == "target" and r["protocol"] == "linear"]
    assert chance == [pytest.approx(1 / NUM_CLASSES)]
    json.dumps(rows, allow_nan=False)
    assert "collapse" in results.format_tables(rows)


def test_what_cannot_be_judged_is_refused():
    broken = lambda params, images: {"level_0": jnp.full((len(images), 5), jnp.nan)}
    with pytest.raises(InputError, match="NaN"):
        judge(broken, {"target": None}, protocol=Protocol())

    def never(params, images):
        raise AssertionError("features were extracted")

    for flag, count in (("lowshot_labels", 50), ("fewshot_shots", 30)):
        protocol = Protocol((flag.split("_")[0],), **{flag: (count,)})
        with pytest.raises(InputError, match=f"^--{flag}={count}"):
            judge(never, {"target": None}, protocol=protocol)
    with pytest.raises(InputError, match="no training image of class 4"):
        evaluate(num_classes=5)
    with pytest.raises(InputError, match=r"^--protocols='tarot'"):
        evaluate(Protocol(protocols=("tarot",)))


@pytest.mark.slow
def test_only_rows_that_depend_on_something_new_are_made_again(tmp_path):
    path = tmp_path / "probe.json"

    def judged(params, protocol=KNN, step=7):
        made = []

        def report(rows):
            made.extend(row["encoder"] for row in rows)
            write_probe_json(path, rows)

        known = KnownRows(path, base_config(), settings_of(protocol), params)
        return evaluate(protocol, params=params, step=step, known=known, report=report), {*made}

    everyone = {"target", "random_init", "pixels"}
    first, made = judged(encoders())
    assert made == everyone
    assert judged(encoders()) == (first, set())
    other = encoders() | {"target": encoders(3)["target"]}
    again, made = judged(other)
    assert made == {"target"}
    assert [r for r in again if r["encoder"] != "target"] == [
        r for r in first if r["encoder"] != "target"
    ]
    assert judged(other, step=8)[1] == {"target"}
    assert judged(other, dataclasses.replace(KNN, fewshot_shots=(2,)), step=8)[1] == set()
    assert judged(other, dataclasses.replace(KNN, seed=1), step=8)[1] == everyone
    more = dataclasses.replace(KNN, protocols=("knn", "quality"))
    assert judged(other, more, step=8)[1] == everyone
    several = lambda *shots: Protocol(("fewshot",), fewshot_shots=shots, batch_size=40)
    first, _ = judged(other, several(1, 2))
    judged(other, several(2, 3))  # replaces the rows with two examples
    assert judged(other, several(1, 2))[0] == first


def test_verdicts_compare_with_the_untrained_encoder():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(48, 64)).astype(np.float32)
    narrow = (rng.normal(size=(48, 2)) @ rng.normal(size=(2, 64))).astype(np.float32)
    project = lambda params, images: {"level_0": images.reshape(len(images), -1) / 255.0 @ params}
    for params, target in (
        ({"target": narrow}, "partial collapse"),
        ({"target": narrow, "random_init": wide}, "partial collapse"),
        ({"target": narrow, "random_init": narrow}, "healthy"),
    ):
        rows = judge(project, params, protocol=Protocol(("quality",)))
        found = {row["encoder"]: row["verdict"] for row in rows if row["encoder"] != "pixels"}
        assert found == dict.fromkeys(params, "healthy") | {"target": target}


def test_quality_uses_all_classes_of_a_sorted_source(monkeypatch):
    monkeypatch.setattr(quality_rows, "QUALITY_ROWS", 50)
    monkeypatch.setattr(extraction, "LIDAR_IMAGES", 20)
    order = np.argsort(TRAIN.labels, kind="stable")
    one_hot = lambda params, images: {"level_0": jnp.eye(4)[images[:, 0, 0, 0]]}
    marked = Split(TRAIN.images[order], TRAIN.labels[order])
    marked.images[:, 0, 0, 0] = marked.labels
    options = {"protocol": Protocol(("quality",)), "embed_views": lambda p, x, r: one_hot(p, x)}
    rows = judge(one_hot, {"target": None}, marked, **options)
    target = next(row for row in rows if row["encoder"] == "target")
    assert target["verdict"] == "healthy"
    assert target["lidar"] > 2.5


def test_rows_of_the_same_identity_replace_each_other(tmp_path):
    path = tmp_path / "probe.json"
    write_probe_json(path, [ROW | {"top1": 0.1}, ROW | {"level": 1, "top1": 0.2}])
    write_probe_json(path, [ROW | {"top1": 0.3}, ROW | {"step": 2, "top1": 0.4}])
    assert [r["top1"] for r in read_probe_json(path)] == [0.3, 0.2, 0.4]


@pytest.mark.parametrize(
    "content",
    [
        "", '{"results": [', '{"results": 5}', '{"results": {}}', '{"results": ""}',
        '{"results": [1]}', "[]", "[" * 100_000,
        json.dumps({"results": [ROW | {"top1": None}]}),
        json.dumps({"results": [ROW | {"top1": 10**400}]}),
        json.dumps({"results": [ROW | {"chosen": {}}]}),
        json.dumps({"results": [ROW | {"protocol": "quality"}]}),
        json.dumps({"results": [{"protocol": "linear", "top1": 0.5}]}),
    ],
)  # fmt: skip
def test_a_foreign_probe_json_is_not_overwritten(tmp_path, content):
    path = tmp_path / "probe.json"
    path.write_text(content)
    assert read_probe_json(path) == []
    with pytest.raises(InputError, match="move it away"):
        write_probe_json(path, [ROW])
    assert path.read_text() == content


def test_processes_that_write_one_probe_json_lose_no_row(tmp_path):
    code = f"""
import pathlib, sys
from hjepa_jax.runs.scores import write_probe_json
for step in range(40):
    row = {ROW!r} | {{"step": step, "seed": sys.argv[1]}}
    write_probe_json(pathlib.Path({str(tmp_path)!r}) / "probe.json", [row])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(read_probe_json(tmp_path / "probe.json")) == 80


def test_tables_show_every_score_in_its_place():
    rows = all_rows()
    table = results.format_tables(rows)
    by_place = {
        (r["encoder"], r["pool"], str(r["level"])): r for r in rows if r["protocol"] == "knn"
    }
    *scores, _ = table.split("\n\n")
    _, chance, header, *lines = scores[0].splitlines()
    assert chance == f"chance: {100 / NUM_CLASSES:.1f} (always the most frequent class)"
    assert max(map(len, table.splitlines())) <= 80
    knn_ends = header.index("knn") + 3
    warned = results.warnings([row for row in rows if "top1" in row])
    notes = scores[-1].splitlines()[1 + len(by_place) :]
    assert " ".join(map(str.strip, notes)) == " ".join(warned)
    encoders = {results.encoder_name(name): name for name in results.ENCODERS}
    trained = [line.startswith("> trained") for line in lines[: len(by_place)]]
    assert trained == sorted(trained, reverse=True)
    assert any(trained)
    for line in lines[: len(by_place)]:
        name, *place = line[2:13].strip(), *line[13:].split()[:2]
        row = by_place[(encoders[name], *place)]
        assert line[:knn_ends].endswith(results.format_score(row))
    assert "verdict" in table


@pytest.mark.parametrize("encoder", ["random_init", "pixels"])
def test_no_baseline_is_called_healthy(encoder):
    assert results.verdict_of({"encoder": encoder, "verdict": "healthy"}) == "baseline"


def test_tensorboard_gets_few_scores():
    rows = evaluate(Protocol(protocols=("knn",), batch_size=40))
    found = results.scalars(rows, group="probe_x")
    assert set(found) == {f"probe_x/knn_{n}" for n in ("trained", "random-init", "raw_pixels")}
    assert found["probe_x/knn_trained"] == results.best_row(rows, "knn", "target")["top1"]


def best_score(rows, protocol, encoder):
    row = results.best_row(rows, protocol, encoder)
    return None if row is None else row["top1"]


def test_the_best_row_is_of_the_newest_checkpoint():
    """A resumed run keeps the rows of its older checkpoints."""
    rows = [
        ROW | {"encoder": encoder, "step": step, "top1": top1, "chosen": {"val_top1": val_top1}}
        for encoder, step, top1, val_top1 in (
            ("target", 100, 0.7, 0.7), ("target", 200, 0.6, 0.5), ("target", 200, 0.55, 0.52),
            ("pixels", 0, 0.3, 0.2), ("pixels", 0, 0.4, 0.3),
        )
    ]  # fmt: skip
    assert best_score(rows, "linear", "target") == 0.55
    assert best_score(rows, "linear", "pixels") == 0.4
    assert best_score(rows, "knn", "target") is None


def test_ties_of_the_best_row_are_broken_by_the_features():
    tied = [
        feature_row(0.6, 0.9, dim=300, pool="concat", level="all"),
        feature_row(0.6, 0.5, dim=100, pool="summary", level=0),
        feature_row(0.6, 0.4, dim=100, pool="mean", level=0),
    ]
    levels = [feature_row(0.6, y, level=x) for x, y in (("all", 0.9), (10, 0.8), (2, 0.7))]
    blocks = [feature_row(0.6, 0.9, num_layers=4), feature_row(0.6, 0.5, num_layers=1)]
    better = [*tied, feature_row(0.61, 0.1)]
    for rows, top1 in ((tied, 0.4), (tied[:2], 0.5), (better, 0.1), (levels, 0.7), (blocks, 0.5)):
        assert best_score(rows, "linear", "target") == top1


def test_the_best_row_depends_on_no_test_score_or_order():
    rng = np.random.default_rng(0)
    places = [(level, pool) for level in (0, 1, "all") for pool in ("mean", "summary", "concat")]
    for _ in range(200):
        draw = lambda *values: rng.choice(values).item()
        rows = [
            feature_row(draw(0.5, 0.6), 0.0, dim=draw(8, 16), level=level, pool=pool)
            for level, pool in places
        ]
        again = [row | {"top1": rng.random()} for row in rng.permutation(np.array(rows))]
        found = results.best_row(again, "linear", "target")
        assert found | {"top1": 0.0} == results.best_row(rows, "linear", "target")


def feature_row(val_top1, top1, **fields):
    return ROW | {"top1": top1, "chosen": {"val_top1": val_top1}} | fields


@pytest.mark.parametrize(
    ("ours", "theirs", "n", "holds"),
    [
        (1.0, 0.625, 8, None),  # noise, which an earlier version called better
        (0.613, 0.430, 2000, True),
        (0.613, 0.430, 40, None),
        (0.55, 0.545, 10_000_000, False),  # certainly better, but by less than one point
        (0.55, 0.535, 1000, None),
        (0.55, 0.535, 100_000, True),
        (0.3, 0.5, 8, False),
    ],
)
def test_better_means_beyond_the_interval(ours, theirs, n, holds):
    rows = [ROW | {"top1": top1, "test_size": n} for top1 in (ours, theirs)]
    found, evidence = results.beats(*rows, 0.01)
    assert found is holds
    assert f"{n:,} test images" in evidence
    assert results.beats(ROW, ROW | {"top1": 0.0}, 0.01)[0] is None, (
        "no verdict without the number of test images"
    )


def test_scores_have_intervals_and_numbers_of_test_images():
    rows = [
        feature_row(0.5, 0.5, test_size=100),
        feature_row(0.5, 0.0, encoder="pixels", test_size=100),
    ]
    table = results.format_tables(rows)
    assert table.startswith("top-1 in percent on 100 test images")
    assert "50.00 (40.4-59.6)" in table
    assert results.format_best(rows, "linear") == "trained 50.0 %, raw pixels 0.0 %"
    assert results.format_best(rows, "knn") is None


def test_settings_at_an_end_are_warned_of():
    note = "l2 1e-10 is the smallest tried, a better one may lie beyond"
    row = feature_row(0.5, 0.5, test_size=100, at_edge=[note], converged=False)
    expected = [f"linear, trained mean level 0: {n}" for n in (note, "the fit did not converge")]
    table = results.format_tables([row, feature_row(0.4, 0.4)]).replace("\n  lie", " lie")
    assert table.splitlines()[-2:] == expected


def test_seeds_have_a_mean_and_standard_deviation():
    row = {"protocol": "linear", "encoder": "target", "level": 0, "pool": "mean"}
    text = results.format_seeds([[row | {"top1": 0.2}], [row | {"top1": 0.4}]])
    assert "30.00 +- 14.14  (2 runs)" in text


@pytest.mark.parametrize(
    "other",
    [{"dim": 9}, {"step": 9}, {"data": "z"}, {"num_layers": 4}, {"test_size": 9}, {"train_size": 9},
     {"seed": 9}],
)  # fmt: skip
def test_rows_that_do_not_compare_are_not_averaged(other):
    first = ROW | {"top1": 0.2, "test_size": 5, "train_size": 5}
    text = results.format_seeds([[first], [first | {"top1": 0.4} | other]])
    (name,) = other
    assert text.count("(1 run, ") == 2
    assert f"40.00  (1 run, {name} {other[name]})" in text
    assert "+- n" not in text


def test_runs_at_their_own_best_steps_are_averaged():
    first = ROW | {"top1": 0.2, "step": 3}
    text = results.format_seeds([[first], [first | {"top1": 0.4, "step": 9}]], any_step=True)
    assert "30.00 +- 14.14  (2 runs)" in text


def test_knn_omits_more_neighbours_than_images():
    rows = evaluate(KNN, train=split(40, 0))
    assert {row["chosen"]["k"] for row in rows} <= {1, 5, 10, 20}


def test_quality_rows_hold_the_numbers_of_the_module():
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    row = quality_rows.judge_quality(x)
    assert row["verdict"] == "healthy"
    assert row["rankme"] == quality_rows.quality.rankme(x)
    assert sum(row["spectrum"]) == pytest.approx(1.0)
