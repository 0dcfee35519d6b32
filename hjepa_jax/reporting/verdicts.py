"""A checklist and next steps for a run, by stated rules on the numbers of its work directory."""

import shlex
from collections.abc import Iterator

from hjepa_jax.evaluation.intervals import difference
from hjepa_jax.evaluation.labelled import MIN_ROWS
from hjepa_jax.evaluation.results import beats, best_row, encoder_name
from hjepa_jax.reporting.facts import Facts
from hjepa_jax.reporting.page import code
from hjepa_jax.runtime.names import encodable

# Whether a check holds (None = unknown), its name, and its numbers.
Check = tuple[bool | None, str, str]

TITLES = {"linear": "the linear probe", "knn": "k-NN"}
BASELINES = [(protocol, encoder) for protocol in TITLES for encoder in ("random_init", "pixels")]
MARGIN = 0.01  # top-1; smaller differences are ignored for any number of images
EASY_COSINE = 0.95
MOSTLY_PLACES = 0.5  # share of the targets' variance; with rotary positions it is near 0.01
BEYOND_PLACES = 0.1  # share of the targets' variance that must be explained beyond the position
SLOW_DATA = 0.1
FEW_EPOCHS = 10  # a run with fewer epochs should be longer
HEADROOM = 0.5  # share of the device's memory; below it, a batch of twice the size fits


def checklist(facts: Facts) -> list[Check]:
    """Returns the checks that a good run passes, each with its numbers."""
    history, step, num_steps = facts.history, facts.history.last_step(), facts.num_steps
    done = step >= num_steps if num_steps else None
    evidence = f"step {step} of {num_steps if num_steps else 'an unknown number'}"
    checks: list[Check] = [(done, "Training reached its last step", evidence)]

    bad = history.last("train/nonfinite_steps")
    evidence = "not recorded" if bad is None else f"{bad:.0f} steps skipped"
    checks.append((None if bad is None else bad == 0, "Every step was finite", evidence))

    (_, loss), fell = history.series("train/loss"), "The loss ended below its first value"
    if len(loss) > 1:
        checks.append((bool(loss[-1] < loss[0]), fell, f"{num(loss[0])} to {num(loss[-1])}"))
    else:
        checks.append((None, fell, "fewer than two values"))
    checks += [collapse_check(facts)] + [_knn_check(facts)] * facts.has_classes
    for protocol, encoder in BASELINES if facts.has_classes else ():
        what = f"Trained features beat {encoder_name(encoder)} by more than {pct(MARGIN)} points"
        holds, evidence = trained_beats(facts, protocol, encoder)
        judged = "" if holds is None else facts.judged(protocol)
        checks.append((holds, f"{what} in {TITLES[protocol]}", evidence + judged))
    newest = max(facts.checkpoints, default=None)
    holds = None if newest is None else newest >= step
    evidence = "no checkpoint" if newest is None else f"newest is step {newest}"
    checks.append((holds, "The last step has a checkpoint", evidence))
    return checks


def collapse_check(facts: Facts) -> Check:
    """Returns the check for a collapse, by the log and the newest checkpoint."""
    what, last = "Features have not collapsed", facts.history.last
    if signs := facts.signs_of_collapse():
        return False, what, "; ".join(signs)
    rank, std, limits = last("train/effective_rank"), last("train/relative_std"), facts.limits
    if rank is None:
        return None, what, "no effective rank recorded"
    evidence = f"effective rank {rank:.1f}, threshold {limits.effective_rank:.1f} of "
    evidence += f"{facts.max_rank}"
    if std is not None:
        evidence += f"; relative std {std:.2g}, threshold {limits.relative_std:.2g}"
    return True, what, evidence


def verdict(facts: Facts) -> str:
    """Returns the verdict on the run in one sentence."""
    holds, _, evidence = collapse_check(facts)
    if holds is False:
        return f"collapsed: {evidence}."
    if not facts.has_classes:
        start = "unknown" if holds is None else "not collapsed"
        return f"{start}. There are no classes to say more."
    found = {pair: trained_beats(facts, *pair) for pair in BASELINES}
    if all(evidence == "not probed" for _, evidence in found.values()):
        return "unknown. The run has not been probed."
    if all(holds for holds, _ in found.values()):
        return "better than random-init and raw pixels, in the linear probe and in k-NN."
    said = {True: [], False: [], None: []}
    for (protocol, encoder), (holds, evidence) in found.items():
        if evidence != "not probed":
            said[holds].append(f"{encoder_name(encoder)} in {TITLES[protocol]}")
    parts = [
        f"{start} {', '.join(names)}"
        for start, names in (
            ("better than", said[True]),
            ("not better than", said[False]),
            ("perhaps better than", said[None]),
        )
        if names
    ]
    return "; ".join(parts) + "."


def trained_beats(facts: Facts, protocol: str, encoder: str) -> tuple[bool | None, str]:
    """Returns whether the best trained features beat the features of `encoder`; see `beats`."""
    ours = best_row(facts.own_probes, protocol, "target")
    theirs = best_row(facts.own_probes, protocol, encoder)
    if ours is None or theirs is None:
        return None, "not probed"
    return beats(ours, theirs, MARGIN)


def _knn_check(facts: Facts) -> Check:
    what, (_, knn) = "k-NN accuracy rose", facts.history.series("eval/knn_top1")
    if len(knn) < 2:
        return None, what, "fewer than two evaluations"
    holds = True if _surely_above(facts, knn[-1], knn[0]) else False if knn[-1] <= knn[0] else None
    n = num_held_out(facts)
    many = "an unknown number of" if n is None else f"at least {n:,}"
    return holds, what, f"{pct(knn[0])} to {pct(knn[-1])} % on {many} held-out images"


def num_held_out(facts: Facts) -> int | None:
    """Returns the minimum number of held-out images of k-NN during training; None if unknown."""
    if facts.steps_per_epoch is None or facts.config.eval.data is not None:
        return None
    # Only images in whole batches are counted, so less than one batch is missing.
    num_images = facts.steps_per_epoch * facts.config.train.batch_size
    return min(facts.config.eval.num_val, num_images // MIN_ROWS)


def _surely_above(facts: Facts, score: float, other: float) -> bool:
    """Returns whether one k-NN score is significantly above another (95 %)."""
    n = num_held_out(facts)
    return bool(n) and difference(float(score), float(other), n, n)[0] > 0


def next_steps(facts: Facts) -> list[tuple[str, str]]:
    """Returns suggestions, each with the rule that led to it; empty if no rule applies."""
    found = [step for rule in _RULES for step in rule(facts)]
    if facts.status == "finished" and not found:
        found.append(("Repeat with other values of `seed` before comparing.", "no rule applies"))
    return found


Suggestions = Iterator[tuple[str, str]]


def _unfinished(facts: Facts) -> Suggestions:
    if facts.status == "interrupted":
        yield "Run the same command again: it resumes.", "not at the last step"
    if facts.status == "not started":
        yield "Start it.", "metrics.jsonl has no line"
    if facts.checkpoints and not facts.probes:
        yield f"Probe it: {_probe_command(facts)}.", "a checkpoint, and no rows in probe.json"


def _unstable(facts: Facts) -> Suggestions:
    if bad := facts.history.last("train/nonfinite_steps"):
        rule = f"train/nonfinite_steps is {bad:.0f}, above 0"
        yield "Lower `optim.learning_rate`, or `optim.clip_norm`.", rule


def _collapsed_or_easy(facts: Facts) -> Suggestions:
    if signs := facts.signs_of_collapse():
        c = facts.config.loss
        what = f"Raise `loss.regularizer_weight` (now {c.regularizer_weight:g})."
        if c.regularizer == "none":
            what = "Set `loss.regularizer=vicreg` and `loss.regularizer_weight=0.01`."
        if c.agreement_weight and c.regularizer == "none":
            what = f"Raise `loss.spread_weight` (now {c.spread_weight:g}), or set "
            what += "`loss.regularizer=vicreg` and `loss.regularizer_weight=0.01`."
        yield what, "; ".join(signs)
        return
    cosine = facts.history.last("train/pred_target_cosine")
    if cosine is not None and cosine > EASY_COSINE:
        what = "Make prediction harder: larger `mask.scale`, smaller `mask.context_scale`."
        yield what, f"train/pred_target_cosine {cosine:.3f} is above {EASY_COSINE}"


def _predicts_places(facts: Facts) -> Suggestions:
    places = facts.history.last("train/position_share")
    explained = facts.history.last("train/explained_variance_level_0")
    if places is None or explained is None or facts.config.model.positions == "rope2d":
        return
    if places > MOSTLY_PLACES and explained < places + BEYOND_PLACES:
        what = "Predictions depend mostly on the place of a patch: try `model.positions=rope2d`."
        yield (
            what,
            (
                f"train/position_share {places:.3f} is above {MOSTLY_PLACES}, and "
                f"train/explained_variance_level_0 {explained:.3f} not {BEYOND_PLACES} above it"
            ),
        )


def _slow(facts: Facts) -> Suggestions:
    wait = facts.history.last("perf/data_wait_fraction")
    if wait is not None and wait > SLOW_DATA:
        what = "Raise `train.steps_per_call`; for streamed data, `data.num_workers`."
        yield what, f"perf/data_wait_fraction {wait:.3f} is above {SLOW_DATA}"
    peak, limit = facts.history.last("perf/peak_memory_bytes"), facts.device_memory
    if peak is not None and limit and peak < HEADROOM * limit:
        part = f"is below {pct(HEADROOM)} % of the device's {gib(limit)}"
        what = "Raise `train.batch_size`, if the device is not busy: it fits."
        yield what, f"perf/peak_memory_bytes, {gib(peak)}, {part}"


def _knn_curve(facts: Facts) -> Suggestions:
    steps, knn = facts.history.series("eval/knn_top1")
    if len(knn) > 2:
        before = knn[steps <= 2 / 3 * steps[-1]]
        rose = len(before) and knn[-1] > before[-1] + MARGIN
        if rose and _surely_above(facts, knn[-1], before[-1]):
            change = f"{pct(before[-1])} to {pct(knn[-1])} %"
            yield (
                "Train longer: `train.num_epochs`.",
                f"eval/knn_top1 rose from {change} in the last third",
            )
    fell = len(knn) and knn[-1] < knn.max() - MARGIN
    if fell and _surely_above(facts, knn.max(), knn[-1]):
        best = f"the {pct(knn.max())} % of step {steps[knn.argmax()]:.0f}"
        what = f"Probe the best checkpoint too: {_probe_command(facts, '--step=best')}."
        yield what, f"eval/knn_top1 ended at {pct(knn[-1])} %, below {best}"


def _no_better(facts: Facts) -> Suggestions:
    """Yields changes that helped other runs (see docs/results.md), if a baseline wins."""
    found = {pair: trained_beats(facts, *pair) for pair in BASELINES}
    lost = [pair for pair, (holds, _) in found.items() if holds is False]
    open_ = [pair for pair, (holds, why) in found.items() if holds is None and why != "not probed"]
    if not lost and open_:
        protocol, encoder = open_[0]
        what = (
            "Repeat with other seeds (`hjepa sweep --seeds=0,1,2`), or judge on more test images."
        )
        rule = f"{TITLES[protocol]}, trained against {encoder_name(encoder)}: {found[open_[0]][1]}"
        yield what, rule
    if not lost or facts.signs_of_collapse():
        return
    protocol, encoder = lost[0]
    rule = f"{TITLES[protocol]}, trained against {encoder_name(encoder)}: {found[lost[0]][1]}"
    c = facts.config
    if not c.loss.agreement_weight:
        yield (
            "Let the views of an image agree: `loss.agreement_weight=2`, `loss.spread_weight=0.5`, "
            "`data.local_views=3`.",
            rule,
        )
    epochs = (facts.num_steps or 0) / (facts.steps_per_epoch or 1)
    if 0 < epochs < FEW_EPOCHS:
        yield f"Train longer: `train.num_epochs` (now {epochs:.3g}).", rule
    rate = c.optim.learning_rate
    yield (
        f"Compare rates: `hjepa sweep` with `--vary=optim.learning_rate={rate / 3:.2g},{rate:g},"
        f"{3 * rate:.2g}`.",
        rule,
    )


def _unreached(facts: Facts) -> Suggestions:
    (_, loss), step = facts.history.series("train/loss"), facts.history.last_step()
    if len(loss) > 1 and loss[-1] >= loss[0]:
        rate = facts.config.optim.learning_rate
        rule = f"train/loss: {num(loss[0])} to {num(loss[-1])}"
        yield f"Lower `optim.learning_rate` (now {rate:g}), or raise `optim.warmup_epochs`.", rule
    newest = max(facts.checkpoints, default=None)
    if newest is not None and newest < step and facts.status not in ("running", "interrupted"):
        rule = f"the newest checkpoint is of step {newest}, and the log ends at step {step}"
        yield "Run the same command again: it trains the steps without a checkpoint.", rule


_RULES = (
    _unfinished, _unstable, _collapsed_or_easy, _predicts_places, _slow, _knn_curve, _no_better,
    _unreached,
)  # fmt: skip


def _probe_command(facts: Facts, *flags: str) -> str:
    """Returns the command that probes the run, in Markdown, quoted for a shell."""
    workdir = f"--workdir={shlex.quote(encodable(str(facts.workdir)))}"
    return code(" ".join(["python -m hjepa_jax.probe", workdir, *flags]))


def num(value: float | None) -> str:
    """Returns four significant digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def gib(num_bytes: float) -> str:
    """Returns bytes in GiB, with two decimals."""
    return f"{num_bytes / 2**30:.2f} GiB"


def pct(value: float | None) -> str:
    """Returns a fraction in percent, with two decimals; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f}"
