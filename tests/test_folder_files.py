"""Every file of a data folder is used, or reported with the reason why it is not."""

import os
import pathlib
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hjepa_jax.data.folder_files import EMPTY, list_folder
from hjepa_jax.data.image_file import IMAGE_SUFFIXES
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError


def write(root, *names, content=None):
    """Writes image files in the format of their suffix; PNG if the suffix is no image format."""
    for i, name in enumerate(names):
        path = pathlib.Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix.lower()
        known = Image.registered_extensions() if suffix in IMAGE_SUFFIXES else {}
        mode, colour = ("L", 60) if suffix in (".pbm", ".pgm") else ("RGB", (60 * (i % 4), 20, 30))
        if content is None:
            Image.new(mode, (6, 6), colour).save(path, known.get(suffix, "PNG"))
        else:
            path.write_bytes(content)


def load(root):
    return open_source(f"folder:{root}", data_dir=None, image_size=4).load()


def names_of(root):
    return [sorted(split.names) for split in load(root)]


def line_of(root, capsys):
    open_source(f"folder:{root}", data_dir=None, image_size=4)
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"folder:{root}: ")


def refused(root, rule):
    with pytest.raises(InputError) as caught:
        load(root)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_folders_inside_a_class_belong_to_it(tmp_path):
    names = ["x/0.png", "x/a/1.png", "x/a/b/2.png", "x/z/3.png", "y/c/4.png", "y/d/5.png"]
    write(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in names))
    train, test = load(tmp_path)
    assert sorted(train.names) == [f"train/{name}" for name in names]
    assert sorted(test.names) == [f"test/{name}" for name in names]
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_images_of_all_suffixes_are_read(tmp_path):
    suffixes = [*IMAGE_SUFFIXES, ".dib", ".mpo", "", ".img", ".tmp~"]
    suffixes += [suffix.upper() for suffix in suffixes]
    names = [f"train/x/{i:02}{suffix}" for i, suffix in enumerate(suffixes)]
    write(tmp_path, *names, "test/x/0.png")
    train, _ = load(tmp_path)
    assert train.names == tuple(names)
    assert train.images.shape == (len(names), 4, 4, 3)


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [("train", "test"), ("Train", "Testing"), ("TRAINING", "test-set"), ("train_set", "val"),
     ("Train Images", "VALID"), ("train", "Validation"), ("train", "dev"), ("train", "val_images")],
)  # fmt: skip
def test_common_names_of_splits_are_known(tmp_path, capsys, train_name, test_name):
    write(tmp_path, f"{train_name}/x/0.png", f"{test_name}/x/1.png")
    assert line_of(tmp_path, capsys) == (
        f"train 1 files in {train_name}/; test 1 files in {test_name}/; 1 class (x)"
    )
    assert names_of(tmp_path) == [[f"{train_name}/x/0.png"], [f"{test_name}/x/1.png"]]


def test_a_test_split_has_precedence_over_val(tmp_path, capsys):
    write(tmp_path, "train/x/0.png", "val/x/1.png", "val/x/2.png", "test/x/3.png", "extra/4.png")
    (tmp_path / "valid").mkdir()
    assert line_of(tmp_path, capsys) == (
        "train 1 files in train/; test 1 files in test/; 1 class (x); not used: "
        "1 folder of 1 file beside train/ and test/ (extra/), "
        "1 folder of 2 files beside train/ and test/ (val/), 1 empty folder (valid/)"
    )


def test_val_replaces_unlabelled_test_images(tmp_path, capsys):
    write(tmp_path, "train/x/0.png", "valid/x/1.png", "test/2.png")
    assert line_of(tmp_path, capsys) == (
        "train 1 files in train/; test 1 files in valid/; 1 class (x); not used: "
        "1 folder of 1 file beside train/ and valid/ (test/)"
    )


def test_images_are_held_out_if_the_test_folder_is_empty(tmp_path, capsys):
    write(tmp_path, "train/x/0.png", "train/x/1.png")
    (tmp_path / "test").mkdir()
    assert line_of(tmp_path, capsys) == (
        "train 1 files in train/; test 1 files held out, by class; 1 class (x); "
        "not used: 1 empty folder (test/)"
    )


ONE_FOLDER_PER_CLASS = "must hold one sub-folder per class"


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (["cat/0.png", "dog/0.png", "test/cat/1.png"], "test is a split: the other classes"),
        (["all/train/x/0.png", "all/test/x/0.png"], "all holds a split, train; name folder:"),
        (["train/train/x/0.png", "test/test/x/0.png"], ONE_FOLDER_PER_CLASS),
        (["train/x/0.png", "Testing/0.png"], ONE_FOLDER_PER_CLASS),
        (["Train/x/0.png", "VAL/y/0.png"], "Train and VAL must have the same classes"),
        ([], ONE_FOLDER_PER_CLASS),
        (["0.png"], "one image cannot be split"),
        (["0.png", "val/0.png"], f"{ONE_FOLDER_PER_CLASS}; images:"),
        (["train/x/0.png", "test/0.png"], ONE_FOLDER_PER_CLASS),
        (["x/0.png"], "one image cannot be split"),
        (["x/0.png", "y/notes.txt"], "there is no image in"),
    ],
)
def test_a_layout_that_breaks_a_rule_is_refused(tmp_path, names, rule):
    for name in names:
        write(tmp_path, name, content=b"text" if name.endswith("txt") else None)
    refused(tmp_path, rule)


def test_unused_files_are_counted_and_named_by_reason(tmp_path, capsys):
    write(tmp_path, "x/0.png", "x/1.png", "y/2.png", "y/3.png", "stray.png", "y/.hidden.png")
    write(tmp_path, ".DS_Store", "x/notes.txt", "README.md", "x/Thumbs.db", content=b"text")
    (tmp_path / "x" / "none").mkdir()
    (tmp_path / "z").mkdir()
    (tmp_path / "y" / "gone.png").symlink_to(tmp_path / "y" / "absent.png")
    (tmp_path / "y" / "around").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "y" / "pipe.png")
    assert line_of(tmp_path, capsys) == (
        "train 3 files; test 1 files held out, by class; 2 classes (x, y); not used: "
        "2 hidden (.DS_Store, y/.hidden.png), "
        "2 beside the class folders (README.md, stray.png), "
        "2 no BMP, GIF, JPEG, PNG, PPM, TIFF or WEBP image (x/Thumbs.db, x/notes.txt), "
        "2 empty folder (x/none/, z/), 1 link to a folder around it (y/around/), "
        "1 link to nothing (y/gone.png), 1 no file (y/pipe.png)"
    )


def test_links_in_a_circle_end(tmp_path):
    write(tmp_path, "x/0.png", "x/1.png", "y/0.png", "y/1.png")
    (tmp_path / "x" / "to_y").symlink_to(tmp_path / "y")
    (tmp_path / "y" / "to_x").symlink_to(tmp_path / "x")
    listing = list_folder("folder:x", tmp_path)
    assert {each.name for each in listing.unused} == {"x/to_y/to_x/", "y/to_x/to_y/"}
    assert len(listing.splits[0].files) == 8


def make_workdir(path, *names):
    write(path, *names, "figures/loss.png")
    (path / "checkpoints").mkdir()
    (path / "config.json").write_text("{}")


def test_work_directories_are_not_classes(tmp_path, monkeypatch, capsys):
    write(tmp_path, "x/0.png", "x/1.png", "y/0.png", "y/1.png")
    make_workdir(tmp_path / "runs" / "first")
    make_workdir(tmp_path / "runs" / "sweep" / "second")
    make_workdir(tmp_path / "y" / "third")
    monkeypatch.chdir(tmp_path)
    open_source("folder:.", data_dir=None, image_size=4)
    (line,) = capsys.readouterr().err.splitlines()
    assert "train 3 files; test 1 files" in line
    assert "3 work directory of a run (runs/first/, runs/sweep/second/, y/third/)" in line
    assert "1 empty folder (runs/)" in line


@pytest.mark.parametrize(
    "files",
    [("report.html", "report.md"), ("report.md",), ("config.json", "metrics.jsonl"),
     ("config.json", "run.json")],
)  # fmt: skip
def test_pictures_of_a_report_are_not_a_class(tmp_path, capsys, files):
    write(tmp_path, "x/0.png", "x/1.png", "y/0.png", "y/1.png", "runs/a_and_b/figures/loss.png")
    for name in files:
        (tmp_path / "runs" / "a_and_b" / name).touch()
    line = line_of(tmp_path, capsys)
    assert "2 classes (x, y)" in line
    assert "1 work directory of a run (runs/a_and_b/)" in line


def test_a_data_folder_that_is_a_work_directory_keeps_classes(tmp_path, capsys):
    # "runs" is a class here.
    make_workdir(tmp_path, "x/0.png", "x/1.png", "runs/0.png", "runs/1.png")
    line = line_of(tmp_path, capsys)
    assert "2 classes (runs, x)" in line
    assert "2 work directory of a run (checkpoints/, figures/)" in line


@pytest.mark.parametrize("spelling", ["{0}/d/x/", "{0}//d/../d/x", "d/x/", "./d/x"])
def test_all_spellings_of_a_path_work(tmp_path, monkeypatch, spelling):
    write(tmp_path / "d" / "x", "train/a/0.png", "test/a/1.png")
    monkeypatch.chdir(tmp_path)
    assert names_of(spelling.format(tmp_path)) == [["train/a/0.png"], ["test/a/1.png"]]


NAMES = [b"caf\xe9", b"\xff\xfe", b"a\nb\x1b[31m", "日本".encode(), b"$x_1$"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_bytes_can_be_read_and_printed(tmp_path, capsys, name):
    name = os.fsdecode(name)
    write(tmp_path, f"train/{name}/{name}.png", f"train/{name}/{name}/0.jpg", f"test/{name}/0.gif")
    write(tmp_path, f"{name}.txt", f"train/{name}/{name}.txt", f"test/{name}/bad.png", content=b"x")
    source = open_source(f"folder:{tmp_path}", data_dir=None, image_size=4)
    train, test = source.load()
    assert (len(train.images), len(test.images)) == (2, 1)
    texts = [*source.info.class_names, *train.names, capsys.readouterr().err]
    for text in texts:
        text.encode()  # UTF-8
    assert len(texts[-1].splitlines()) == 2
    assert all(text.isprintable() for text in texts[:-1])


LAYOUTS = [[""], ["train"], ["Train", "valid"], ["TRAINING", "test"]]
SPLITS = ["train", "TRAINING", "test", "Val", "valid", "dev", "extra"]
FOLDERS = ["a", "b", "a/in", "a/in/deep", "b/.cache", "b/in", "", "runs", ".git"]
FILES = [
    "0.png", "1.JPG", "2.jfif", "3", "4.webp", "5.txt", "6.json", ".hidden", "._0.png", "7.tif",
    "8.heic",
]  # fmt: skip
KINDS = ["image"] * 5 + ["text", "empty", "inner link", "outer link", "broken link", "run"]


@st.composite
def folders(draw):
    """Draws a data set: file name to kind. Most are valid; some mix splits and classes."""
    layout = draw(st.sampled_from(LAYOUTS))
    splits = layout + (draw(st.sampled_from([[], [], [], SPLITS])))
    entry = st.tuples(*map(st.sampled_from, (splits, FOLDERS, FILES, KINDS)))
    found = {
        "/".join(filter(None, parts[:3])): parts[3]
        for parts in draw(st.lists(entry, min_size=1, max_size=20))
        if layout == [""] or parts[1] != "runs"  # only one split would have this class
    }
    for split in layout:
        for name in ("a", "b"):
            for i in range(2):
                found["/".join(filter(None, (split, name, f"main{i}.png")))] = "image"
    return found


def make(root, outside, files):
    for name, kind in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {"inner link": root, "outer link": outside, "broken link": root / "absent"}
        if path.exists() or path.is_symlink():
            continue
        if kind in targets:
            path.symlink_to(targets[kind])
        elif kind == "image":
            shutil.copyfile(outside, path)
        elif kind == "run":
            make_workdir(path)
        else:
            path.write_bytes(b"" if kind == "empty" else b"some text")


def is_visible_image(path):
    if path.name.startswith(".") or path.is_symlink() or not path.is_file():
        return False
    try:
        Image.open(path).close()
    except OSError:
        return False
    return True


def check_every_file_is_used_or_named(files):
    with tempfile.TemporaryDirectory() as temporary:
        root, outside = pathlib.Path(temporary, "data"), pathlib.Path(temporary, "outside.png")
        Image.new("RGB", (6, 6), (90, 20, 30)).save(outside)
        make(root, outside, files)
        try:
            listing = list_folder("folder:x", root)
        except InputError as error:  # the message names the error in the layout
            message = str(error)
            return message.startswith("data.source=") and "\n" not in message
        used = [os.path.relpath(path, root) for split in listing.splits for path in split.files]
        unused = [each.name for each in listing.unused if each.reason != EMPTY]
        assert len(used) == len(set(used))
        assert not any(part[0] == "." for path in used for part in pathlib.PurePath(path).parts)
        for name, reason in listing.unused:
            if is_visible_image(root / name):
                assert reason.startswith("beside "), (
                    f"{name} is an image, but its reason is: {reason}"
                )
        assert len(unused) == len(set(unused))
        assert not {*used} & {*unused}
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.relpath(os.path.join(directory, name), root)
                parents = [f"{parent}/" for parent in pathlib.PurePath(path).parents]
                found = (path in used) + (path in unused) + (f"{path}/" in unused)
                inside = sum(parent in unused for parent in parents)
                assert found + inside >= 1, f"{path} is neither used nor reported"
                assert not (path in used and inside), (
                    f"{path} is used, but a folder around it is unused"
                )
        for split in listing.splits:
            labels = [] if split.labels is None else split.labels
            assert len(labels) in (0, len(split.files))
            assert set(labels) == set(range(len(split.class_names)))
        return True


@given(folders())
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
def test_every_file_is_used_or_named(files):
    assert check_every_file_is_used_or_named(files)


@pytest.mark.slow
@given(folders())
@settings(max_examples=1000, deadline=None, database=None)
def test_every_file_of_many_folders_is_used_or_named(files):
    assert check_every_file_is_used_or_named(files)


def test_missing_memory_is_stated_in_numbers(tmp_path, monkeypatch):
    write(tmp_path, "train/x/0.png", "test/x/0.png")
    monkeypatch.setattr("hjepa_jax.data.base.available_bytes", lambda: 95)
    refused(tmp_path, "needs 0.0 GiB of memory for its images, and 0.0 GiB")
    monkeypatch.setattr("hjepa_jax.data.base.available_bytes", lambda: 96)
    assert [len(split.images) for split in load(tmp_path)] == [1, 1]


@pytest.mark.parametrize("kind", ["folder", "images"])
def test_links_out_of_the_folder_are_followed_on_request(tmp_path, kind):
    """Follows links to a class folder and to a file. Circular links end."""
    root = tmp_path / "data"
    write(tmp_path / "store", "cats/0.png", "cats/inner/1.png", "dog.png")
    write(root, "dog/0.png", "dog/2.png")
    (root / "cat").symlink_to(tmp_path / "store" / "cats")
    (root / "dog" / "1.png").symlink_to(tmp_path / "store" / "dog.png")
    (tmp_path / "store" / "cats" / "circle").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "cats" / "back").symlink_to(root)
    refused(root, "data.follow_links=True follows it")
    source = open_source(f"{kind}:{root}", data_dir=None, image_size=4, follow_links=True)
    names = sorted(name for split in source.load() for name in split.names)
    assert names == ["cat/0.png", "cat/inner/1.png", "dog/0.png", "dog/1.png", "dog/2.png"]


def test_class_folders_may_have_any_names_and_order(tmp_path):
    """In both splits, labels follow the order of the names by code point."""
    names = ["10", "9", "Zebra", "b c", "a'b", "äpfel", "日本", "🦊", " lead", "train x"]
    for split in ("train", "test"):
        write(tmp_path, *(f"{split}/{name}/0.png" for name in names))
    source = open_source(f"folder:{tmp_path}", data_dir=None, image_size=4)
    assert source.info.class_names == tuple(sorted(names))
    for split in source.load():
        classes = [source.info.class_names[label] for label in split.labels]
        assert [pathlib.PurePath(name).parts[1] for name in split.names] == classes
