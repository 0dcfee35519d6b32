"""Sections of the report about the representation: probes, pictures, features."""

import contextlib

import numpy as np
from matplotlib.figure import Figure

from hjepa_jax.evaluation.quality import singular_values
from hjepa_jax.evaluation.results import (
    QUALITY_COLUMNS,
    best_row,
    column,
    differing,
    encoder_name,
    scores_by,
    tested_on,
    trained_first,
    verdict_of,
    warnings,
)
from hjepa_jax.reporting.facts import Facts
from hjepa_jax.reporting.figures import (
    Panel,
    bars,
    changing_curves,
    confusion_matrix,
    histograms,
    scatter_maps,
    spectrum,
)  # fmt: skip
from hjepa_jax.reporting.image_figures import (
    as_pictures,
    as_rgb,
    masks,
    neighbours,
    principal_components,
    snapshot_figures,
)
from hjepa_jax.reporting.look import KNN_K
from hjepa_jax.reporting.page import Section, escape, table
from hjepa_jax.reporting.verdicts import num, pct
from hjepa_jax.runs.scores import Row
from hjepa_jax.runtime.backend import quiet_tensorflow

NUM_FIRST, NUM_NEAREST = 3, 2  # images on the first screen, and neighbours of each
_TITLES = {"knn": "k-NN"}  # titles of protocols that differ from their names


def probes_section(facts: Facts) -> Section | None:
    figures, parts = {}, []
    scored = [row for row in facts.probes if "top1" in row]
    lines = {}
    for name, suffix in (("level 0", ""), ("summary tokens", "_summary")):
        steps, knn = facts.history.series(f"eval/knn_top1{suffix}")
        if len(steps):
            lines[name] = (steps, 100 * knn)
    title = f"k-NN on held-out {facts.config.eval.data or 'training'} images"
    panel = Panel(title, "top-1, percent", lines, from_zero=True)
    figures |= changing_curves([panel], "knn", "k-NN accuracy over training")
    if scored:
        names = list(dict.fromkeys(column(row) for row in scored))
        where = ["encoder", "pool", "level", "dim", "step", *differing(scored)]
        cells = scores_by(trained_first(scored), where)
        rows = [
            [_features_of(dict(zip(where, key, strict=True))), *(s.get(n, "-") for n in names)]
            for key, s in cells.items()
        ]
        parts += [
            f"Top-1 in percent on {tested_on(scored)}, with its 95 % interval; each protocol on "
            "every representation:",
            table(["features", *(_TITLES.get(name, name) for name in names)], rows),
            "mean: average over the patches; concat: levels and summary tokens side by side; in "
            "brackets: the number of dimensions.",
        ]
        if edges := warnings(scored):
            parts.append("\n".join(f"- {text}" for text in edges))
    own = [row for row in facts.own_probes if "top1" in row and not row.get("labels")]
    for name in dict.fromkeys(row["protocol"] for row in own if row["encoder"] != "pixels"):
        figures[f"probe_{name}"] = (
            _bars([row for row in own if row["protocol"] == name], name),
            f"{_TITLES.get(name, name.capitalize())} probe beside its baselines",
        )
    quality = [row for row in facts.probes if row["protocol"] == "quality"]
    if quality:
        more = differing(quality)
        rows = [
            [_features_of({n: r.get(n) for n in ("encoder", "pool", "level", "step", *more)}),
             verdict_of(r), *(num(r.get(n)) for n in QUALITY_COLUMNS)]
            for r in trained_first(quality)
        ]  # fmt: skip
        parts.append(table(["features", "verdict", *QUALITY_COLUMNS], rows))
    if not parts and not figures:
        return None
    return "Probes", "\n\n".join(parts) or "probe.json has no rows yet.", figures


def _features_of(row: Row) -> str:
    """Returns encoder, pooling, level and size in words: "trained, mean, level 0 (64)"."""
    name = f"{encoder_name(row['encoder'])}, {_pool(row)}"
    name += f" ({row['dim']})" if "dim" in row else ""
    name += f", step {row['step']}" if row["step"] else ""
    rare = (n for n in row if n not in ("encoder", "pool", "level", "dim", "step"))
    return name + "".join(f", {n} {row[n]}" for n in rare)


def _pool(row: Row) -> str:
    if row["encoder"] == "pixels":
        return "as they are"
    level = "all levels" if row["level"] == "all" else f"level {row['level']}"
    return f"mean, {level}" if row["pool"] == "mean" else str(row["pool"])


def first_figures(facts: Facts) -> dict[str, tuple[Figure, str]]:
    """Returns three small figures: best scores, nearest neighbours and masks."""
    names = ("target", "random_init", "pixels")
    best = {
        title: [best_row(facts.own_probes, protocol, name) for name in names]
        for protocol, title in (("linear", "linear probe"), ("knn", "k-NN"))
    }
    figures, few = {}, slice(NUM_FIRST)
    if any(any(rows) for rows in best.values()):
        scores = {
            encoder_name(name): [np.nan if (row := rows[i]) is None else 100 * row["top1"]
                                 for rows in best.values()]
            for i, name in enumerate(names)
        }  # fmt: skip
        drawn = bars(list(best), scores, title="Best features", ylabel="top-1, percent")
        figures["scores"] = (drawn, "Best features of each encoder")
    if (look := facts.look) is not None:
        shown = as_pictures(np.concatenate([look.images[few, None], look.neighbours[few]], axis=1))
        same = [] if look.same_class is None else look.same_class[few, :NUM_NEAREST].tolist()
        pictures = shown[:, 0], shown[:, 1 : 1 + NUM_NEAREST]
        drawn = neighbours(*pictures, look.names[few], same)
        figures["examples"] = (drawn, "Images and their nearest neighbours")
        seen = look.snapshot
        drawn = masks(as_rgb(seen.pixels[few]), [state[few] for state in seen.states])
        figures["hidden"] = (drawn, "What the network sees, and what it predicts")
    return figures


def _bars(rows: list[Row], protocol: str) -> Figure:
    """Returns bars for the newest step of each encoder, from the first row per representation."""
    rows = trained_first(rows)
    encoders = list(dict.fromkeys(r["encoder"] for r in rows if r["encoder"] != "pixels"))
    newest = {e: max(r["step"] for r in rows if r["encoder"] == e) for e in encoders}
    scores = {}
    for row in rows:
        if row["encoder"] == "pixels" or row["step"] == newest[row["encoder"]]:
            scores.setdefault((row["encoder"], row["pool"], row["level"]), 100 * row["top1"])
    groups = list(dict.fromkeys(key[1:] for key in scores if key[0] != "pixels"))
    pixels = [value for key, value in scores.items() if key[0] == "pixels"]
    return bars(
        [_pool({"encoder": "", "pool": pool, "level": level}) for pool, level in groups],
        {encoder_name(e): [scores.get((e, *g), np.nan) for g in groups] for e in encoders},
        title=f"{_TITLES.get(protocol, protocol.capitalize())} probe",
        ylabel="top-1, percent",
        limits={"raw pixels": pixels[0]} if pixels else {},
    )


def look_section(facts: Facts) -> Section:
    if facts.look is None:
        return "What it sees", f"No pictures: {escape(facts.no_look)}.", {}
    captions = {
        "masks": "Masks of training, at every level",
        "views": "Views as in training, of images at data.image_size; dark patches are not seen",
        "pca": "First three principal components of the features",
        "cosine": "Cosine of prediction and target, where something was predicted",
        "similarity": "Similarity of the framed patch to all others",
        "attention": "Attention of the target encoder: last block by head, and rollout",
    }
    figures = snapshot_figures(facts.look.snapshot)
    text = f"Training images, and the checkpoint at step {facts.look.step}."
    return "What it sees", text, {name: (figures[name], captions[name]) for name in captions}


def features_section(facts: Facts) -> Section | None:
    look = facts.look
    if look is None:
        return None
    levels = {name.replace("_", " "): x for name, x in look.features.items()}
    text = (
        f"{len(look.images)} held-out training images beside {look.bank_size} others, target "
        f"encoder at step {look.step}. "
    )
    if look.labels is None or look.predictions is None:
        text += f"The images have no classes. Neighbours and maps are made of: {look.best}."
    else:
        top1 = float((look.predictions == look.labels).mean())
        text += (
            "Neighbours, confusion matrix and maps are made of the features with the best k-NN "
            f"score among those others: {look.best}. k-NN with k = "
            f"{min(KNN_K, look.bank_size)} gets {pct(top1)} % of the held-out images right. The "
            "test images are left to the probes."
        )
    values = {name: singular_values(x) for name, x in levels.items()}
    count = len(look.neighbours)
    queries, found = look.images[:count], look.neighbours
    shown = as_pictures(np.concatenate([queries[:, None], found], axis=1))  # on one scale
    pictures = shown[:, 0], shown[:, 1:]
    same = [] if look.same_class is None else look.same_class.tolist()
    confusion = {}
    if look.labels is not None and look.predictions is not None:
        matrix = confusion_matrix(look.labels, look.predictions, look.class_names)
        confusion = {"confusion": (matrix, "Confusion matrix of k-NN")}
    return "Features", text, {
        "neighbours": (neighbours(*pictures, look.names[:count], same), "Nearest neighbours"),
        **confusion,
        "map": (
            scatter_maps(_maps(look.best_features), look.labels, look.class_names),
            "Maps of the features in two dimensions",
        ),
        "spectrum": (spectrum(values), "Spectrum of the features"),
        "histogram": (histograms(levels), "Values of the features"),
    }  # fmt: skip


def _maps(x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns PCA, t-SNE and, if the extra `maps` is installed, UMAP."""
    maps = {"PCA": principal_components(x, 2)}
    if len(x) <= 30:  # too few for neighbourhoods
        return maps
    from sklearn.manifold import TSNE  # slow to import
    from threadpoolctl import threadpool_limits

    tsne = TSNE(perplexity=min(30, len(x) // 4), init="pca", max_iter=500, random_state=0)
    with threadpool_limits(1):  # with two threads t-SNE takes ten times the processor time
        maps["t-SNE"] = tsne.fit_transform(x)
    with contextlib.suppress(ImportError):
        quiet_tensorflow()
        # This import also imports TensorFlow if it is installed.
        from umap import UMAP  # pyright: ignore[reportMissingImports]

        umap = UMAP(n_neighbors=min(15, len(x) // 4), n_jobs=1, random_state=0)
        maps["UMAP"] = np.asarray(umap.fit_transform(x))
    return maps
