"""Fingerprints of data: equal for equal data, different if one byte in memory differs.

    fingerprint(train)                  # "all-0f3c...": every byte in memory
    fingerprint(train, source.records)  # "all-9b71...-52aa...": also the streamed files

Names of files and classes in memory do not count: renamed data is the same data.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Shaped

from hjepa_jax.data.base import Split
from hjepa_jax.data.records import Records, read_or_next

# Prefix of fingerprints that cover every byte. Older versions hashed a sample and wrote no prefix.
# Such a fingerprint proves nothing and is never compared.
MARK = "all-"
NUM_DIGITS = 16
CHUNK_BYTES = 2**24  # bytes hashed at a time; copied if the array is not contiguous
NUM_SAMPLED = 64  # streamed records that are decoded


def fingerprint(train: Split, records: Records | None = None, *, test: Split | None = None) -> str:
    """Returns `MARK` and hexadecimal digits over images and labels, if there are any.

    Args:
      train: type, shape and all bytes of its images, and its labels.
      records: a streamed training set. Its length, the names and sizes of its files and 64 decoded
        records count. The modification times of its files have digits of their own: see `content`.
      test: counts like `train`.
    """
    splits = [train] if test is None else [train, test]
    arrays = []
    for split in splits:
        arrays.append(split.images)
        if split.labels is not None:
            arrays.append(split.labels.astype("<i4"))
    if records is None:
        return MARK + digest_arrays(*arrays)
    stamps = records.stamps()
    sizes = repr((len(records), [stamp[:2] for stamp in stamps])).encode()
    step = max(1, len(records) // NUM_SAMPLED)
    sample = np.stack([read_or_next(records, row)[0] for row in range(0, len(records), step)])
    found = digest_arrays(*arrays, np.frombuffer(sizes, np.uint8), sample)
    times = hashlib.sha256(repr([stamp[2] for stamp in stamps]).encode()).hexdigest()
    return f"{MARK}{found}-{times[:NUM_DIGITS]}"


def content(data: str) -> str:
    """Returns a fingerprint without modification times: equal for copies of the same files."""
    return data[: len(MARK) + NUM_DIGITS]


def differ(old: object, new: object) -> bool:
    """Returns whether two comparable fingerprints differ."""
    return _comparable(old, new) and old != new


def same_content(old: object, new: object) -> bool:
    """Returns whether two fingerprints prove that the images are the same, wherever they lie."""
    return _comparable(old, new) and content(str(old)) == content(str(new))


def other_content(old: object, new: object) -> bool:
    """Returns whether two fingerprints prove that the images differ."""
    return differ(old, new) and not same_content(old, new)


def _comparable(*data: object) -> bool:
    return all(isinstance(each, str) and each.startswith(MARK) for each in data)


def why_redrawn(source: str, old: object, new: object) -> str:
    """Returns the rule that refuses a run on `shapes` as an older version drew them; else "".

    The program draws this set itself, so nobody can restore the images of the run.

    Args:
      source: data source of the run, as in its config.
      old: fingerprint of the images that the run was trained on; None if unknown.
      new: fingerprint of the images that are drawn now.
    """
    if source != "shapes" or not old or old == new:
        return ""
    return (
        "was trained on shapes as an older version drew them, and the set was redrawn since; "
        "choose another --workdir"
    )


def digest_arrays(*arrays: Shaped[np.ndarray, "..."]) -> str:
    """Returns 16 hexadecimal digits over types, shapes and every byte of the arrays.

    Threads hash chunks by SHA-256, for which many processors have special instructions.
    """
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for array in map(np.atleast_1d, arrays):
            whole.update(f"{array.dtype.str} {array.shape}".encode())
            num_rows = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
            starts = range(0, len(array), num_rows)
            chunks = (array[start : start + num_rows] for start in starts)  # views
            for digest in pool.map(_digest, chunks):
                whole.update(digest)
    return whole.hexdigest()[:NUM_DIGITS]


def _digest(chunk: Shaped[np.ndarray, "n ..."]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data).digest()
