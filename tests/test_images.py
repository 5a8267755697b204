"""Pictures: prepared to the same numbers as transformers prepares them; what is no picture is refused with a reason."""

from __future__ import annotations

import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image as pil
from transformers.image_utils import load_image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as their_smart_resize
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from edgeexport.errors import CheckpointError, EdgeExportError, UsageError
from edgeexport.session.image_file import MAX_IMAGE_PIXELS
from edgeexport.session.images import (
    Image,
    ImageContract,
    PatchContract,
    PixelContract,
    choose_grid,
    contract_from_processor,
    patches,
    pixels,
    placeholder_count,
    read_image,
    smart_resize,
)

PICTURES = Path(str(importlib.util.find_spec("skimage").origin)).parent / "data"
REAL = ("astronaut.png", "coffee.png", "rocket.jpg", "page.png", "logo.png", "no_time_for_that_tiny.gif")
"""Colour, photographs, grey text, alpha, a palette."""

CONFIGS: dict[str, dict[str, Any]] = {
    "class defaults": {},
    "small budget": {"size": {"shortest_edge": 12544, "longest_edge": 100352}},
    "enlarged": {"size": {"shortest_edge": 1 << 20, "longest_edge": 1 << 21}},
    "other numbers": {
        "patch_size": 8,
        "merge_size": 3,
        "temporal_patch_size": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.25, 2.0],
        "rescale_factor": 1 / 128,
        "size": {"shortest_edge": 5000, "longest_edge": 300000},
    },
}

DEFAULT = contract_from_processor({})


def built(*grids: tuple[int, int]) -> PatchContract:
    return msgspec.structs.replace(DEFAULT, grids=grids)


def noise(height: int, width: int) -> Image:
    generator = np.random.default_rng(height * 100_003 + width)
    return Image(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(config: dict[str, Any], picture: Any, kind: Any = Glm4vImageProcessorPil) -> tuple[Any, tuple[int, int]]:
    made = kind(**config)(picture, return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    return made["pixel_values"], (rows, columns)


def assert_as_theirs(image: Image, config: dict[str, Any], picture: Any, kind: Any = Glm4vImageProcessorPil) -> None:
    expected, grid = theirs(config, picture, kind)
    made, our_grid = patches(image, contract_from_processor(config))
    assert our_grid == grid
    assert made.dtype == np.float32
    assert made.shape == expected.shape
    assert made.flags.c_contiguous
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


def code(error: pytest.ExceptionInfo[EdgeExportError]) -> str:
    return error.value.findings[0].code


# patches


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_real_pictures_become_the_same_patches(name: str, config: dict[str, Any]) -> None:
    assert_as_theirs(read_image(PICTURES / name), config, load_image(str(PICTURES / name)))


def test_glm46v_prepares_the_same() -> None:
    path = PICTURES / "chelsea.png"
    assert_as_theirs(read_image(path), {}, load_image(str(path)), Glm46VImageProcessorPil)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 200),
        (27, 29),
        (28, 28),
        (3, 17),
        (10, 1999),
        (1999, 10),
        (42, 14),
        (70, 98),
        (641, 333),
    ],
)
def test_odd_sizes_become_the_same_patches(height: int, width: int) -> None:
    image = noise(height, width)
    assert_as_theirs(image, {}, pil.fromarray(image.array))


@pytest.mark.parametrize(("height", "width"), [(10, 20000), (20000, 10), (1, 201), (28, 5601)])
def test_a_strip_is_refused_as_transformers_refuses_it(height: int, width: int) -> None:
    image = noise(height, width)
    with pytest.raises(ValueError, match="aspect ratio"):
        theirs({}, pil.fromarray(image.array))
    for refuses in (lambda: patches(image, DEFAULT), lambda: choose_grid(height, width, built((8, 8)))):
        with pytest.raises(UsageError) as caught:
            refuses()
        assert code(caught) == "image-too-narrow"
        assert caught.value.findings[0].where == f"height {height}, width {width}"


side = st.integers(1, 6000) | st.integers(1, 60)


@given(
    side, side, st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 1 << 22), st.integers(1, 16)
)
@example(1, 1, 14, 2, 2, 12544, 900)
@example(10, 1999, 14, 2, 2, 12544, 900)
@example(42, 70, 14, 2, 2, 1, 16)  # halves are rounded to even
@settings(max_examples=400, deadline=None)
def test_smart_resize_is_theirs(
    height: int, width: int, patch: int, merge: int, frames: int, smallest: int, times: int
) -> None:
    largest = smallest * times
    contract = msgspec.structs.replace(
        DEFAULT,
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=frames,
        min_pixels=smallest,
        max_pixels=largest,
    )
    try:
        expected = their_smart_resize(frames, height, width, frames, patch * merge, smallest, largest)
    except ValueError:
        with pytest.raises(UsageError):
            smart_resize(height, width, contract)
    else:
        assert smart_resize(height, width, contract) == expected


# grids


def test_a_built_grid_takes_any_picture() -> None:
    image = read_image(PICTURES / "coffee.png")
    made, grid = patches(image, built((20, 10), (6, 18)), (6, 18))
    stretched = pil.fromarray(image.array).resize((18 * 14, 6 * 14), pil.Resampling.BICUBIC)
    expected, their_grid = theirs({"do_resize": False}, stretched)
    assert grid == their_grid == (6, 18)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


def test_a_grid_that_was_not_built_is_refused() -> None:
    for contract in (built((8, 8)), DEFAULT):
        with pytest.raises(UsageError) as caught:
            patches(noise(50, 50), contract, (8, 10))
        assert code(caught) == "grid-not-built"
    with pytest.raises(UsageError) as caught:
        choose_grid(50, 50, DEFAULT)
    assert code(caught) == "grid-not-built"


def test_the_smart_grid_is_chosen_if_it_was_built() -> None:
    height, width = 400, 600
    _, smart = theirs({}, pil.new("RGB", (width, height)))
    assert choose_grid(height, width, built((8, 12), smart, (16, 24))) == smart


@pytest.mark.parametrize(
    ("height", "width", "grids", "expected"),
    [
        (2400, 1080, ((24, 24), (52, 24), (24, 52)), (52, 24)),  # portrait
        (1080, 2400, ((24, 24), (52, 24), (24, 52)), (24, 52)),  # landscape
        (500, 510, ((52, 24), (24, 24), (24, 52)), (24, 24)),
        (500, 500, ((8, 8), (32, 32), (128, 128)), (32, 32)),  # one shape, the nearest number of patches
        (500, 500, ((16, 8), (8, 16)), (8, 16)),  # a tie: fewer rows
        (500, 500, ((8, 16), (16, 8)), (8, 16)),  # whatever the order
        (1, 1, ((24, 24), (52, 24)), (24, 24)),
    ],
)
def test_else_the_grid_of_the_nearest_shape_and_size(
    height: int, width: int, grids: tuple[tuple[int, int], ...], expected: tuple[int, int]
) -> None:
    assert choose_grid(height, width, built(*grids)) == expected


def test_placeholders_are_the_features_after_the_merge() -> None:
    for height, width in ((300, 400), (1, 1), (700, 90)):
        made, grid = patches(noise(height, width), DEFAULT)
        processor = Glm4vImageProcessorPil()
        assert placeholder_count(grid, DEFAULT) == processor.get_number_of_image_patches(height, width) // 2**2
        assert len(made) == 4 * placeholder_count(grid, DEFAULT)


# pixels


@pytest.mark.parametrize("name", REAL)
def test_pixels_are_those_of_a_plain_square_processor(name: str) -> None:
    mean, std = (0.498, 0.4, 0.3), (0.502, 0.2, 1.5)
    processor = ViTImageProcessorPil(
        size={"height": 224, "width": 224}, resample=pil.Resampling.BICUBIC, image_mean=list(mean), image_std=list(std)
    )
    expected = processor(load_image(str(PICTURES / name)), return_tensors="np")["pixel_values"]
    made = pixels(read_image(PICTURES / name), PixelContract(size=224, mean=mean, std=std))
    assert made.dtype == np.float32
    assert made.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


# files


def saved(picture: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """One small file of each kind that phones and browsers write."""
    colour = pil.fromarray(noise(23, 31).array)
    alpha = colour.convert("RGBA")
    alpha.putalpha(pil.fromarray(noise(23, 31).array[:, :, 0]))
    palette = colour.quantize(16)
    deep = pil.fromarray(np.arange(23 * 31, dtype=np.uint16).reshape(23, 31) * 90)
    made = {
        "png": saved(colour, "PNG"),
        "png grey": saved(colour.convert("L"), "PNG"),
        "png grey alpha": saved(alpha.convert("LA"), "PNG"),
        "png alpha": saved(alpha, "PNG"),
        "png palette": saved(palette, "PNG"),
        "png palette transparent": saved(palette, "PNG", transparency=3),
        "png 16 bits": saved(deep, "PNG"),
        "png 1 bit": saved(colour.convert("1"), "PNG"),
        "jpeg": saved(colour, "JPEG"),
        "jpeg grey": saved(colour.convert("L"), "JPEG"),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "jpeg progressive": saved(colour, "JPEG", progressive=True),
        "webp": saved(colour, "WEBP", lossless=True),
        "webp alpha": saved(alpha, "WEBP", lossless=True),
        "bmp": saved(colour, "BMP"),
        "gif": saved(palette, "GIF"),
        "gif of two frames": saved(palette, "GIF", save_all=True, append_images=[colour.rotate(180).quantize(16)]),
    }
    for orientation in range(1, 9):
        exif = pil.Exif()
        exif[0x0112] = orientation
        made[f"jpeg turned {orientation}"] = saved(colour, "JPEG", exif=exif)
    return made


FILES = files()


@pytest.mark.parametrize("name", FILES)
def test_files_are_decoded_as_load_image_decodes_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[name])
    expected = np.array(load_image(str(path)))
    for source in (path, FILES[name]):
        np.testing.assert_array_equal(read_image(source).array, expected)


def test_a_tag_that_cannot_be_written_again_does_not_keep_a_picture_from_being_turned() -> None:
    """transformers rewrites all EXIF tags when it turns a picture, and fails over this one."""
    turn = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    odd = struct.pack(">HHII", 0x011A, 7, 1, 0)  # a resolution of undefined type
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turn + odd + bytes(4)
    picture = pil.fromarray(noise(9, 7).array)
    content = saved(picture, "JPEG", exif=exif)
    with pytest.raises(TypeError):
        load_image(pil.open(io.BytesIO(content)))
    upright = np.rot90(np.array(pil.open(io.BytesIO(content))), -1)
    np.testing.assert_array_equal(read_image(content).array, upright)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def gif_claiming(width: int, height: int) -> bytes:
    content = FILES["gif"]
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not-an-image"),
    "text": (b"<html>404 not found</html>", "not-an-image"),
    "zeros": (bytes(1000), "not-an-image"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "not-an-image"),
    "a tiff, which is not read": (saved(pil.new("RGB", (4, 4)), "TIFF"), "not-an-image"),
    "a png cut short": (FILES["png"][:-900], "damaged-image"),
    "a jpeg cut short": (FILES["jpeg"][:-300], "damaged-image"),
    "a webp cut short": (FILES["webp"][:-300], "damaged-image"),
    "a bmp cut short": (FILES["bmp"][:-300], "damaged-image"),
    "a gif cut short": (FILES["gif"][:-300], "damaged-image"),
    "exif of no known byte order": (
        saved(pil.new("RGB", (4, 4)), "WEBP", exif=b"Exif\0\0XX\0*" + bytes(20)),
        "damaged-image",
    ),
    "a png with a short header": (FILES["png"][:11] + b"\x0c" + FILES["png"][12:], "damaged-image"),
    "too few rows": (png_claiming(100, 100), "damaged-image"),
    "just over the limit": (png_claiming(10_001, 10_000), "image-too-large"),
    "a bomb": (png_claiming(60_000, 60_000), "image-too-large"),
    "the largest claim": (png_claiming(2**31 - 1, 2**31 - 1), "image-too-large"),
    "a gif bomb": (gif_claiming(65535, 65535), "image-too-large"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_files_are_refused_with_a_reason(name: str) -> None:
    content, expected = BAD[name]
    with pytest.raises(UsageError) as caught:
        read_image(content)
    assert code(caught) == expected


def test_the_limit_itself_is_allowed_by_the_header_check() -> None:
    with pytest.raises(UsageError) as caught:
        read_image(png_claiming(10_000, MAX_IMAGE_PIXELS // 10_000))
    assert code(caught) == "damaged-image"


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png", Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(UsageError) as caught:
            read_image(path)
        assert code(caught) == "media-unreadable"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(UsageError) as caught:
        read_image(path)
    assert code(caught) == "media-too-large"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["floats", "alpha", "grey", "no rows"],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Image(array)
    assert code(caught) == "not-an-image"


@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=6)), max_size=4),
    st.data(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_end_in_a_picture_or_a_typed_error(
    name: str, edits: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    content = bytearray(FILES[name])
    for place, piece in edits:
        at = place % min(len(content), 200) if place % 2 else place % len(content)  # headers are hit more often
        content[at : at + len(piece)] = piece
    length = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    try:
        image = read_image(bytes(content[:length]))
    except UsageError as error:
        assert error.findings[0].code in ("not-an-image", "damaged-image", "image-too-large")
    else:
        assert image.array.shape == (image.height, image.width, 3)


# the contract


@pytest.mark.parametrize("kind", [Glm4vImageProcessorPil, Glm46VImageProcessorPil])
def test_missing_keys_are_the_class_defaults(kind: Any) -> None:
    assert contract_from_processor({}) == PatchContract(
        patch_size=kind.patch_size,
        temporal_patch_size=kind.temporal_patch_size,
        merge_size=kind.merge_size,
        min_pixels=kind.size["shortest_edge"],
        max_pixels=kind.size["longest_edge"],
        rescale_factor=kind.rescale_factor,
        mean=tuple(kind.image_mean),
        std=tuple(kind.image_std),
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_file_that_transformers_saved_is_read_back(config: dict[str, Any], tmp_path: Path) -> None:
    Glm46VImageProcessorPil(**config).save_pretrained(tmp_path)
    saved_config = msgspec.json.decode((tmp_path / "preprocessor_config.json").read_bytes())
    assert contract_from_processor(saved_config) == contract_from_processor(config)
    assert contract_from_processor({"image_processor": saved_config}) == contract_from_processor(config)


def test_older_files_name_the_limits_in_other_words() -> None:
    wanted = contract_from_processor({"size": {"shortest_edge": 5000, "longest_edge": 60000}})
    assert contract_from_processor({"min_pixels": 5000, "max_pixels": 60000}) == wanted
    assert contract_from_processor({"size": {"min_pixels": 5000, "max_pixels": 60000}}) == wanted
    assert contract_from_processor({"size": {"shortest_edge": 5000, "longest_edge": 60000}, "max_pixels": 7}) == wanted


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 0},
        {"patch_size": 2.5},
        {"patch_size": True},
        {"patch_size": 10**30},
        {"merge_size": -2},
        {"temporal_patch_size": "2"},
        {"patch_size": 256, "merge_size": 16, "temporal_patch_size": 16},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0.0, 0.1, 0.1]},
        {"image_std": [float("inf")] * 3},
        {"rescale_factor": 0},
        {"rescale_factor": float("nan")},
        {"size": 448},
        {"size": {"height": 448, "width": 448}},
        {"size": {"shortest_edge": 5000}},
        {"size": {"shortest_edge": 5000, "longest_edge": 4000}},
        {"size": {"shortest_edge": 0, "longest_edge": 4000}},
        {"size": {"shortest_edge": 5000, "longest_edge": 1 << 40}},
        {"resample": 2},
        {"do_resize": False},
        {"do_rescale": 0},
        {"do_normalize": False},
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": ["Glm4vImageProcessor"]},
        {"image_processor": "Glm4vImageProcessor"},
    ],
    ids=str,
)
def test_a_processor_that_cannot_be_followed_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        contract_from_processor(config)
    assert code(caught) == "bad-preprocessor"


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
known_key = st.sampled_from(
    [
        "patch_size",
        "merge_size",
        "temporal_patch_size",
        "size",
        "min_pixels",
        "max_pixels",
        "image_mean",
        "image_std",
        "rescale_factor",
        "resample",
        "do_resize",
        "image_processor_type",
        "feature_extractor_type",
        "image_processor",
    ]
)


@given(st.dictionaries(known_key, json_value, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_processor_file_gives_a_contract_or_a_typed_error(config: dict[str, Any]) -> None:
    try:
        contract = contract_from_processor(config)
    except CheckpointError:
        return
    assert smart_resize(30, 40, contract)[0] % contract.factor == 0


@pytest.mark.parametrize(
    "contract", [built((24, 24), (52, 24)), PixelContract(size=224, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))]
)
def test_contracts_survive_json(contract: ImageContract) -> None:
    text = msgspec.json.encode(contract)
    assert msgspec.json.decode(text, type=PatchContract | PixelContract) == contract


@pytest.mark.parametrize(
    "change",
    [
        {"grids": [[25, 24]]},
        {"grids": [[24, 24], [24, 24]]},
        {"grids": [[4096, 4096]]},
        {"grids": [[0, 24]]},
        {"resample": "lanczos"},
        {"min_pixels": 20_000_000},
        {"colour": "BGR"},
        {"kind": "pixels"},
    ],
    ids=str,
)
def test_a_contract_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    plain = {**msgspec.to_builtins(DEFAULT), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, PatchContract | PixelContract)


def test_torch_is_not_needed() -> None:
    program = f"""
import sys
from pathlib import Path
from edgeexport.session.images import *
assert "PIL" not in sys.modules, "Pillow is loaded when a picture is"
patches(read_image(Path({str(PICTURES / "coffee.png")!r})), contract_from_processor({{}}))
assert not {{"torch", "torchvision", "transformers", "scipy"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
