"""95 % confidence intervals of accuracies: the uncertainty from the choice of test images.

References:
  Wilson 1927, "Probable inference, the law of succession, and statistical inference" (J. Am. Stat.
  Assoc. 22). Newcombe 1998, "Interval estimation for the difference between independent
  proportions" (Statistics in Medicine 17), method 10.
"""

import math

Z95 = 1.959964  # a standard normal number lies between -Z95 and Z95 with a probability of 95 %


def wilson(share: float, n: int) -> tuple[float, float]:
    """Returns the lower and upper end of Wilson's 95 % interval of a share, both in [0, 1]."""
    z2 = Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    # Exact at the ends, where rounding would leave 1e-17.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def difference(ours: float, theirs: float, num_ours: int, num_theirs: int) -> tuple[float, float]:
    """Returns the 95 % interval of `ours - theirs`, two accuracies.

    The accuracies are treated as if measured on different test images. On a shared test set two
    encoders tend to be wrong on the same images, so their difference varies less and the interval
    is too wide: it is conservative. A paired interval needs the predictions for each image, which
    results do not store.

    `num_ours` and `num_theirs` are the numbers of test images, at least 1.
    """
    our_low, our_high = wilson(ours, num_ours)
    their_low, their_high = wilson(theirs, num_theirs)
    gap = ours - theirs
    below = math.hypot(ours - our_low, their_high - theirs)
    above = math.hypot(our_high - ours, theirs - their_low)
    return gap - below, gap + above
