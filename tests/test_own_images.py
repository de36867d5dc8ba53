"""Folders of images with hidden folders, other files, transparency, damage and unusual names."""

import os
import pickle
import shutil
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_intervene.contexts import context_name
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.image_files import decode_image, flat_image, open_image


def fill(folder, count=10, seed=0, size=16):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture
def source(tmp_path):
    fill(tmp_path / "data" / "obs")
    fill(tmp_path / "data" / "hat", seed=1)
    return tmp_path / "data"


def counts(folder):
    return {
        name: len(images)
        for name, images in ContextImages.from_dataset(load_contexts(folder), None, 16)
        .by_context()
        .items()
    }


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "deeper/.thumbnails", ".git/objects"])
def test_hidden_folders_hold_no_images(source, hidden):
    fill(source / "hat" / hidden, 6)
    fill(source / "hat" / "more", 3, seed=2)
    assert counts(source) == {"obs": 10, "hat": 13}


def test_files_that_are_left_out_are_counted(source, caplog):
    for number in range(30):
        (source / "hat" / f"{number}.HEIC").write_bytes(b"ftypheic")
    (source / "hat" / "notes.txt").write_text("x")
    (source / "shoe").mkdir()
    (source / "shoe" / "a.heic").write_bytes(b"ftypheic")
    assert counts(source) == {"obs": 10, "hat": 10}
    assert (
        "left out (30 .heic, 1 .txt)" in caplog.text
        and "holds no images that can be read (1 .heic)" in caplog.text
    )


@pytest.mark.parametrize("other", [" hat ", "hat=1.0"])
def test_folders_that_are_taken_as_one_context_are_named(source, caplog, other):
    fill(source / other, 5, seed=2)
    assert counts(source) == {"obs": 10, "hat": 15}
    both = " and ".join(sorted([repr(other), repr("hat")]))
    assert f"the contexts {both} are taken as one, 'hat'" in caplog.text


def test_obs_beside_a_concept_is_refused(source):
    fill(source / "hat+obs")
    with pytest.raises(ValueError, match="context 'hat.obs' names 'obs' beside a concept"):
        counts(source)


def test_rows_of_a_metadata_file_and_its_images_are_compared_one_by_one(tmp_path, caplog):
    """Two rows too many for one image do not hide two images without a row."""
    fill(tmp_path, 20)
    names = [f"{number}.png,{'obs' if number < 9 else 'hat'}" for number in range(18)]
    (tmp_path / "metadata.csv").write_text(
        "\n".join(["file_name,context", *names, *[names[9]] * 2])
    )
    assert counts(tmp_path) == {"obs": 9, "hat": 11}
    assert "2 images that the metadata file does not name are left out" in caplog.text
    assert "names 1 images more than once, and each counts as often (9.png)" in caplog.text


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "1-transparent", "L-transparent", "RGB-transparent"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_parts_are_white(tmp_path, mode, channels):
    """The images have black strokes on a transparent background."""
    strokes = Image.new("LA", (8, 8), (0, 0))
    strokes.paste((0, 255), (2, 2, 6, 4))
    if mode.endswith("-transparent"):  # a grey level or a colour is transparent
        kind = mode.partition("-")[0]
        image = Image.new(kind, (8, 8), 255 if kind != "RGB" else (200, 10, 10))
        image.paste(0 if kind != "RGB" else (0, 0, 0), (2, 2, 6, 4))
        image.save(tmp_path / "a.png", transparency=255 if kind != "RGB" else (200, 10, 10))
    elif mode == "P":
        strokes.convert("RGBA").quantize(4).save(tmp_path / "a.png")
    else:
        strokes.convert(mode).save(tmp_path / "a.png")
    found = np.asarray(flat_image(open_image(tmp_path / "a.png"), channels)).reshape(8, 8, -1)
    expected = np.full((8, 8, channels), 255)
    expected[2:4, 2:6] = 0
    np.testing.assert_array_equal(found, expected)
    half = flat_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), channels)
    assert abs(np.asarray(half).flat[0] - 127) <= 1


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_everywhere(source, mode):
    image = Image.new(mode, (16, 16))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        flat_image(image, 3)
    image.save(source / "hat" / "deep.tiff")
    with pytest.raises(ValueError, match="deep.tiff.*more than 8 bits a channel"):
        counts(source)


def test_a_concept_may_be_called_like_a_split(source):
    fill(source / "train", seed=3)
    assert counts(source) == {"obs": 10, "hat": 10, "train": 10}
    shutil.move(source, source.with_name("whole"))
    shutil.move(source.with_name("whole"), source / "train")
    assert counts(source) == {"obs": 10, "hat": 10, "train": 10}  # its split `train`


def test_the_error_for_a_large_image_says_so(source, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    fill(source / "hat", 1, size=40)
    with pytest.raises(
        ValueError, match="0.png. of context 'hat' has 40x40 pixels, .* at most .* make it smaller"
    ):
        counts(source)


def test_names_that_are_not_text(source):
    shutil.copy(source / "hat" / "0.png", os.fsencode(source / "hat" / "caf") + b"\xe9.png")
    with pytest.raises(ValueError, match=r"caf\\udce9.png has bytes that are not UTF-8: rename it"):
        counts(source)


@pytest.mark.parametrize(
    "table",
    [
        "",
        "file_name,context",
        "file_name,context\n,obs\n0.png,hat",
        "file_name,context\n.,obs",
        "file_name,context\n../x.png,obs",
    ],
)
def test_a_table_that_names_no_images(tmp_path, table):
    folder = fill(tmp_path / "data", 2)
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(ValueError) as error:
        counts(folder)
    assert "\n" not in str(error.value)


# Damage


def mutated(whole, seed):
    """Damage the bytes of an image file: change some, cut some off, or repeat some.

    The checksums of a PNG are corrected, so that the decoder reads further.
    """
    rng = np.random.default_rng(seed)
    data = bytearray(whole)
    for place in rng.integers(0, len(data), rng.integers(1, 6)):
        data[place] = rng.integers(256)
    if rng.random() < 0.3:
        data = data[: rng.integers(1, len(data))]
    elif rng.random() < 0.3:
        start = rng.integers(0, len(data))
        data[start:start] = data[start : start + 40]
    if data[:4] == b"\x89PNG":
        at = 8
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            end = at + 8 + length
            if end + 4 > len(data):
                break
            data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "ico", "tga"])
def test_damage_is_one_kind_of_error(tmp_path, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    image.save(
        tmp_path / f"a.{kind}", **{"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}
    )
    whole = (tmp_path / f"a.{kind}").read_bytes()
    for seed in range(300):
        try:
            flat_image(decode_image(mutated(whole, seed), "it"), 3)
        except ValueError as error:
            assert str(error).startswith("it ") and "\n" not in str(error)


def test_exif_that_is_not_valid(source):
    file = source / "hat" / "0.png"
    Image.open(file).save(file, exif=b"Exif\0\0PM\0*\0\0\0\x08")
    try:
        counts(source)
    except ValueError as error:
        assert "0.png" in str(error)
    dataset = Dataset.from_dict(
        {
            "image": [str(file)] * 8 + [str(source / "obs" / "1.png")] * 8,
            "context": ["obs"] * 8 + ["hat"] * 8,
        }
    )
    try:
        ContextImages.from_dataset(dataset, None, 16)
    except ValueError as error:
        assert "0.png" in str(error)


# A cache of decoded images


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 70_000,
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', ",
        200,
        -50,
    ],
)
def test_a_broken_cache_is_made_again(source, tmp_path, content):
    def load():
        return ContextImages.from_dataset(
            load_contexts(source), None, 16, cache_dir=tmp_path / "cache"
        ).pixels.clone()

    expected = load()
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    assert (load() == expected).all()


def test_a_cache_that_is_cut_while_it_is_read_raises_an_error(source, tmp_path):
    read = lambda: ContextImages.from_dataset(  # noqa: E731
        load_contexts(source), None, 256, cache_dir=tmp_path / "cache"
    )  # noqa: E731
    images = read()
    part, _ = images.split(0.2)
    (file,) = (tmp_path / "cache").glob("*.npy")
    whole = file.read_bytes()
    os.truncate(file, 5000)
    for use in (
        lambda: images.images(torch.arange(3)),
        lambda: part.pixels,
        lambda: part.on("cpu"),
        images.by_context,
    ):
        with pytest.raises(
            OSError, match=r"npy was cut while it was being read: do not change the image cache"
        ):
            use()
    file.unlink()
    file.write_bytes(whole)  # another file in its place may be cut
    os.truncate(file, 10)
    again = read()  # written again
    assert torch.equal(again.pixels, read().pixels)


def test_a_cache_that_is_cut_between_two_rows_is_an_error(source, tmp_path, monkeypatch):
    images = ContextImages.from_dataset(
        load_contexts(source), None, 256, cache_dir=tmp_path / "cache"
    )
    expected = images.images(torch.tensor([5, 0, 5]))
    assert torch.equal(expected, images.stored[[5, 0, 5]])
    again = pickle.loads(pickle.dumps(images.file)).rows(np.array([5]), images.stored.shape, "u1")
    assert np.array_equal(again, expected[:1])
    (file,) = (tmp_path / "cache").glob("*.npy")
    preadv = os.preadv

    def cut_then_read(*arguments):
        os.truncate(file, 5000)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", cut_then_read)
    with pytest.raises(OSError, match="npy was cut while it was being read"):
        images.images(torch.tensor([5, 0]))
    monkeypatch.undo()
    with pytest.raises(IndexError, match="rows from -1 to 0 of 20 are not there"):
        images.images(torch.tensor([-1, 0]))


def test_parts_of_a_cache_from_a_killed_process_are_removed(source, tmp_path):
    read = lambda: ContextImages.from_dataset(  # noqa: E731
        load_contexts(source), None, 16, cache_dir=tmp_path / "cache"
    )  # noqa: E731
    read()
    (file,) = (tmp_path / "cache").glob("*.npy")
    left = [file.with_name(f".{file.name}.{n}.images.part") for n in (1, 2)]
    for path in left:
        path.write_bytes(b"half")
    other = file.with_name(".other.npy.1.images.part")
    other.write_bytes(b"of another data set")
    file.unlink()
    read()
    assert not any(path.exists() for path in left) and other.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_existing_cache_need_not_be_writable(source, tmp_path):
    read = lambda: ContextImages.from_dataset(  # noqa: E731
        load_contexts(source), None, 16, cache_dir=tmp_path / "cache"
    )  # noqa: E731
    expected = read().pixels.clone()
    (tmp_path / "cache").chmod(0o500)
    assert torch.equal(read().pixels, expected)


# Warnings about what is left out


def said(caplog, folder, **options):
    """Return the warnings while a folder is read, and the images of each context."""
    caplog.clear()
    found = ContextImages.from_dataset(load_contexts(folder), None, 16, **options).by_context()
    return caplog.text, {name: len(images) for name, images in found.items()}


def test_images_beside_the_folders_of_contexts(source, caplog):
    assert said(caplog, source)[0] == ""
    fill(source, 3, seed=5)
    text, found = said(caplog, source)
    assert "images outside the sub-folders of contexts are left out (3 .png)" in text
    assert found == {"obs": 10, "hat": 10}


def test_links_to_folders_and_pipes_are_not_followed(source, caplog, tmp_path):
    fill(tmp_path / "elsewhere", 4, seed=5)
    (source / "hat" / "more").symlink_to(tmp_path / "elsewhere")
    (source / "hat" / "loop").symlink_to(source / "hat")
    os.mkfifo(source / "hat" / "a.png")
    text, found = said(caplog, source)
    assert "left out (2 link to a folder, 1 pipe or device)" in text and found["hat"] == 10
    shutil.rmtree(source / "obs")
    # the folder of a context may be a link
    (source / "obs").symlink_to(fill(tmp_path / "other", 9, seed=6))
    assert said(caplog, source)[1] == {"obs": 9, "hat": 10}


def test_a_pipe_among_the_files_of_a_data_set_is_refused(source, tmp_path):
    load_contexts(source).save_to_disk(tmp_path / "saved")
    (source / "metadata.csv").write_text("file_name,context\nobs/0.png,obs\n")
    for folder, name in ((tmp_path / "saved", "dataset_info.json"), (source, "metadata.csv")):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name} is a pipe or a device, not a file"):
            load_contexts(folder)


def test_empty_and_wrong_arguments(source):
    with pytest.raises(ValueError, match="the name of the data is empty"):
        load_contexts(" ")
    for resolution in ("x", 16.5):
        with pytest.raises(TypeError, match="resolution must be a whole number"):
            ContextImages.from_dataset(load_contexts(source), None, resolution)
    images = ContextImages.from_dataset(load_contexts(source), None, 16)
    for fraction in (None, "0.2", float("nan"), 1):
        with pytest.raises(ValueError, match="must be a number between 0 and 1"):
            images.split(fraction)


@pytest.mark.parametrize(
    "name",
    ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information"],
)
def test_folders_that_systems_make_are_not_contexts(source, caplog, name):
    """A disk station keeps small copies of the images in `@eaDir`."""
    fill(source / name, 9)
    fill(source / "hat" / name, 9)
    (source / "hat" / "._0.png").write_bytes(b"x")
    assert said(caplog, source) == ("", {"obs": 10, "hat": 10})


def test_letters_that_another_system_writes_otherwise_are_the_same(source, caplog):
    """On macOS the u of a name and its dots are two characters."""
    one, two = (unicodedata.normalize(form, "m\u00fctze") for form in ("NFC", "NFD"))
    assert one != two
    fill(source / two, 9, seed=3)
    fill(source / one, 4, seed=4)
    assert said(caplog, source) == ("", {"obs": 10, "hat": 10, one: 13})
    assert context_name(two, ["hat", one]) == context_name({two: 1}, ["hat", one]) == one


def test_names_that_are_almost_the_same_are_said(source, caplog):
    fill(source / "Hat", 9, seed=3)
    text, found = said(caplog, source)
    assert "the names of the concepts 'Hat' and 'hat' are almost the same" in text
    assert found == {"obs": 10, "Hat": 9, "hat": 10}


def test_words_that_a_table_reads_as_nothing(tmp_path):
    """`datasets` takes NA for an empty cell."""
    fill(tmp_path / "images", 20)
    rows = [f"{n}.png,{'obs' if n < 10 else 'NA'}" for n in range(20)]
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(["file_name,context", *rows]))
    with pytest.raises(
        ValueError, match="image 10 has no context: .*words such as NA and null in a"
    ):
        counts(tmp_path / "images")


def test_a_folder_called_like_a_table_is_none(source):
    (source / "metadata.csv").mkdir()
    assert counts(source) == {"obs": 10, "hat": 10}


def test_a_name_that_is_too_long_for_the_system():
    with pytest.raises(OSError, match="xxx cannot be read .File name too long"):
        load_contexts("./" + "x" * 300)


def test_a_cache_knows_an_image_that_was_replaced_by_one_of_the_same_size_and_time(
    source, tmp_path
):
    def first():
        return ContextImages.from_dataset(load_contexts(source), None, 16, cache_dir=tmp_path / "c")

    file = source / "hat" / "0.bmp"
    for grey in (1, 200):
        Image.new("RGB", (16, 16), (grey,) * 3).save(file)
        os.utime(file, (10**9, 10**9))
        images = first()
        assert (images.pixels == grey).all(dim=(1, 2, 3)).sum() == 1


def test_other_folders_than_the_split(source, tmp_path, caplog):
    for name in ("train", "test"):
        shutil.copytree(source, tmp_path / "splits" / name)
    assert said(caplog, tmp_path / "splits")[0] == ""
    fill(tmp_path / "splits" / "shoe", 9, seed=7)
    text, found = said(caplog, tmp_path / "splits")
    assert (
        "only the split 'train' is read; these folders are left out: shoe" in text
        and "shoe" not in found
    )


def test_images_that_a_table_does_not_name(tmp_path, caplog):
    folder = fill(tmp_path / "data", 20)
    rows = [f"{n}.png,{'obs' if n < 8 else 'hat'}" for n in range(16)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,context", *rows]))
    text, found = said(caplog, folder)
    assert "4 images that the metadata file does not name are left out" in text and found == {
        "obs": 8,
        "hat": 8,
    }


def test_images_of_other_concepts(source, caplog):
    fill(source / "shoe", 9, seed=7)
    found = ContextImages.from_dataset(load_contexts(source), ["hat"], 16)
    assert found.contexts == ["obs", "hat"]
    assert (
        "9 of 29 images are left out: their contexts name other concepts (shoe) than hat"
        in caplog.text
    )


def test_frames_after_the_first(source, caplog):
    frames = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in (10, 200)]
    for kind in ("gif", "webp", "tiff", "png"):
        frames[0].save(source / "hat" / f"moving.{kind}", save_all=True, append_images=frames[1:])
    text, found = said(caplog, source)
    assert "4 images have several frames: the first of each is used" in text and found["hat"] == 14


def test_copies_in_several_contexts(source, caplog):
    shutil.copy(source / "obs" / "0.png", source / "hat" / "copy.png")
    # copies within one context are allowed
    shutil.copy(source / "obs" / "1.png", source / "obs" / "copy.png")
    assert "1 images are the same in several contexts (obs, hat)" in said(caplog, source)[0]


def test_formats_that_need_other_programs_are_not_opened(source, caplog):
    """Pillow would start Ghostscript for EPS."""
    Image.new("RGB", (16, 16)).save(source / "hat" / "a.eps")
    text, found = said(caplog, source)
    assert "left out (1 .eps)" in text and found["hat"] == 10
    (source / "hat" / "a.eps").rename(source / "hat" / "b.png")
    with pytest.raises(ValueError, match="b.png.*cannot be read as an image"):
        said(caplog, source)


def test_a_saved_data_set_with_offsets_outside_its_file_is_refused(tmp_path):
    """Reading such a row would end the process."""
    images = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(4)]
    contexts = ["obs", "obs", "hat", "hat"]
    Dataset.from_dict({"context": contexts, "image": images}).save_to_disk(tmp_path / "saved")
    assert load_contexts(tmp_path / "saved")["context"] == contexts
    file = next((tmp_path / "saved").glob("*.arrow"))
    right = np.array([0, 3, 6, 9, 12], "<i4").tobytes()  # of the texts of contexts
    content = file.read_bytes()
    assert content.count(right) == 1
    wrong = np.array([0, 3, 6, 9, 2**31 - 8], "<i4").tobytes()
    file.write_bytes(content.replace(right, wrong))
    with pytest.raises(OSError, match="cannot be read: it is incomplete or corrupt"):
        load_contexts(tmp_path / "saved")
