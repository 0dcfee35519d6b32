"""What the facts of a run amount to: a checklist and next steps, each by a rule that is stated.

Nothing here is opinion: a rule looks at numbers of the workdir, and quotes them.
"""

import shlex

from hjepa_jax.evaluation.intervals import difference
from hjepa_jax.evaluation.labelled import MIN_ROWS
from hjepa_jax.evaluation.results import beats, best_row
from hjepa_jax.reporting.facts import Facts
from hjepa_jax.reporting.page import code
from hjepa_jax.runtime.names import encodable

# One entry: whether it holds (None: not known), what, and the numbers that say so.
Check = tuple[bool | None, str, str]

MARGIN = 0.01  # of top-1: a smaller difference is taken for noise on any number of images
EASY_COSINE = 0.95
MOSTLY_PLACES = 0.5  # of the targets' variance; runs of rotary positions stay near 0.01
BEYOND_PLACES = 0.1  # of the targets' variance: what is explained of it beside the place
SLOW_DATA = 0.1
HEADROOM = 0.5  # of the device's memory: with less in use a batch of twice the size fits


def checklist(facts: Facts) -> list[Check]:
    """What one wants of a run, each ticked from its numbers."""
    history, checks = facts.history, []
    step, num_steps = history.last_step(), facts.num_steps
    done = step >= num_steps if num_steps else None
    evidence = f"step {step} of {num_steps if num_steps else 'an unknown number'}"
    checks.append((done, "Training reached its last step", evidence))

    bad = history.last("train/nonfinite_steps")
    evidence = "not recorded" if bad is None else f"{bad:.0f} steps left out"
    checks.append((None if bad is None else bad == 0, "Every step was finite", evidence))

    _, loss = history.series("train/loss")
    checks.append(
        (
            bool(loss[-1] < loss[0]),
            "The loss ended below its first value",
            f"{num(loss[0])} to {num(loss[-1])}",
        )
        if len(loss) > 1
        else (None, "The loss ended below its first value", "fewer than two values")
    )

    checks.append(collapse_check(facts))

    checks.append(_knn_check(facts))

    for protocol in ("linear", "knn"):
        for encoder, name in (("random_init", "random-init"), ("pixels", "raw pixels")):
            what = f"Trained features beat {name} by more than {pct(MARGIN)} points ({protocol})"
            holds, evidence = trained_beats(facts, protocol, encoder)
            judged = "" if holds is None else facts.judged(protocol)
            checks.append((holds, what, evidence + judged))

    newest = max(facts.checkpoints, default=None)
    checks.append(
        (None, "The last step has a checkpoint", "no checkpoint")
        if newest is None
        else (newest >= step, "The last step has a checkpoint", f"newest is step {newest}")
    )
    return checks


def collapse_check(facts: Facts) -> Check:
    """Whether the features are spread and use many directions, by the newest line and the look."""
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


def trained_beats(facts: Facts, protocol: str, encoder: str) -> tuple[bool | None, str]:
    """Whether the best trained features beat those of `encoder`; see `beats`."""
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
    """Training images that k-NN is scored on during training, at least; None if not known."""
    if facts.steps_per_epoch is None:
        return None
    # The training images that fill whole batches: fewer than one batch is missing.
    num_images = facts.steps_per_epoch * facts.config.train.batch_size
    return min(facts.config.eval.num_val, num_images // MIN_ROWS)


def _surely_above(facts: Facts, score: float, other: float) -> bool:
    """Whether a k-NN score during training lies above another by more than chance (95 %)."""
    n = num_held_out(facts)
    return bool(n) and difference(float(score), float(other), n, n)[0] > 0


def next_steps(facts: Facts) -> list[tuple[str, str]]:
    """Suggestions, each with the rule that led to it; none where no rule applies."""
    history, found = facts.history, []
    if facts.status == "interrupted":
        found.append(("Run the same command again: it goes on.", "not at the last step"))
    if facts.status == "not started":
        found.append(("Start it.", "metrics.jsonl has no line"))
    if facts.checkpoints and not facts.probes:
        what = f"Judge it: {_probe_command(facts)}."
        found.append((what, "a checkpoint, and no rows in probe.json"))
    if bad := history.last("train/nonfinite_steps"):
        rule = f"train/nonfinite_steps is {bad:.0f}, above 0"
        found.append(("Lower `optim.learning_rate`, or `optim.clip_norm`.", rule))
    signs = facts.signs_of_collapse()
    if signs:
        what = "Raise `loss.regularizer_weight`, or bring `loss.regularizer` into use."
        found.append((what, "; ".join(signs)))
    cosine = history.last("train/pred_target_cosine")
    if cosine is not None and cosine > EASY_COSINE and not signs:
        what = "Make prediction harder: larger `mask.scale`, smaller `mask.context_scale`."
        found.append((what, f"train/pred_target_cosine {cosine:.3f} is above {EASY_COSINE}"))
    places = history.last("train/position_share")
    explained = history.last("train/explained_variance_level_0")
    mostly = (
        places is not None
        and explained is not None
        and places > MOSTLY_PLACES
        and explained < places + BEYOND_PLACES
    )
    if mostly and facts.config.model.positions != "rope2d":
        what = "Most of what is predicted is where a patch is: try `model.positions=rope2d`."
        rule = (
            f"train/position_share {places:.3f} is above {MOSTLY_PLACES}, and "
            f"train/explained_variance_level_0 {explained:.3f} not {BEYOND_PLACES} above it"
        )
        found.append((what, rule))
    wait = history.last("perf/data_wait_fraction")
    if wait is not None and wait > SLOW_DATA:
        rule = f"perf/data_wait_fraction {wait:.3f} is above {SLOW_DATA}"
        what = "Raise `train.steps_per_call`; where data is streamed, `data.num_workers`."
        found.append((what, rule))
    peak, limit = history.last("perf/peak_memory_bytes"), facts.device_memory
    if peak is not None and limit and peak < HEADROOM * limit:
        rule = (
            f"perf/peak_memory_bytes, {gib(peak)}, is below {pct(HEADROOM)} % of the device's "
            f"{gib(limit)}"
        )
        found.append(("Raise `train.batch_size`, if the device is not busy: it fits.", rule))
    steps, knn = history.series("eval/knn_top1")
    if len(knn) > 2:
        before = knn[steps <= 2 / 3 * steps[-1]]
        rose = len(before) and knn[-1] > before[-1] + MARGIN
        if rose and _surely_above(facts, knn[-1], before[-1]):
            rule = (
                f"eval/knn_top1 rose from {pct(before[-1])} to {pct(knn[-1])} % in the last third"
            )
            found.append(("Train longer: `train.num_epochs`.", rule))
    fell = len(knn) and knn[-1] < knn.max() - MARGIN
    if fell and _surely_above(facts, knn.max(), knn[-1]):
        rule = (
            f"eval/knn_top1 ended at {pct(knn[-1])} %, below the {pct(knn.max())} % of step "
            f"{steps[knn.argmax()]:.0f}"
        )
        what = f"Judge the best checkpoint too: {_probe_command(facts, '--step=best')}."
        found.append((what, rule))
    better, evidence = trained_beats(facts, "linear", "random_init")
    if not better and evidence != "not probed":
        rule = f"linear, trained against random-init: {evidence}"
        found.append(("Do not trust this representation yet: see the checklist.", rule))
    if facts.status == "finished" and not found:
        found.append(("Repeat with other values of `seed` before comparing.", "no rule applies"))
    return found


def _probe_command(facts: Facts, *flags: str) -> str:
    """The command that probes the run, as Markdown; it can be pasted into a shell."""
    workdir = f"--workdir={shlex.quote(encodable(str(facts.workdir)))}"
    return code(" ".join(["python -m hjepa_jax.probe", workdir, *flags]))


def num(value: float | None) -> str:
    """Four significant digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def gib(num_bytes: float) -> str:
    """Bytes in GiB, two decimals."""
    return f"{num_bytes / 2**30:.2f} GiB"


def pct(value: float | None) -> str:
    """A fraction in percent, two decimals; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f}"
