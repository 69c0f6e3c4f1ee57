"""Tests that normalisations equal independent formulas, can be inverted, and travel as plain arrays."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import Compose

from datm_ray.data import Transform, fit_transform, patience, transform
from datm_ray.data.patience import eigenpairs
from datm_ray.data.transform import Kind, Normaliser
from datm_ray.errors import CorruptFileError, DatasetError

KINDS: tuple[Kind, ...] = get_args(Kind)


def photographs(count: int = 300, channels: int = 3, height: int = 4, width: int = 6) -> NDArray[np.uint8]:
    """Smooth random images [n c h w]: neighbouring pixels are correlated, as in real ones."""
    noise = np.random.default_rng(0).normal(size=(count, channels, height, width))
    smooth = noise.cumsum(axis=-1).cumsum(axis=-2)
    return np.clip(128 + 30 * smooth, 0, 255).astype(np.uint8)


def scaled(images: NDArray[np.uint8], levels: int = 255) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(levels)


def published_zca(images: NDArray[np.uint8], levels: int, eps: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean [d] and matrix [d d] by a singular value decomposition of torch's covariance."""
    flat = torch.from_numpy(images.reshape(len(images), -1)).double() / levels
    u, s, _ = torch.linalg.svd(torch.cov(flat.T))
    return flat.mean(0).numpy(), (u @ torch.diag(torch.rsqrt(s + eps)) @ u.T).numpy()


@pytest.mark.parametrize("levels", [16, 255])
@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_zca_is_the_published_formula(levels: int, eps: float) -> None:
    """ZCA's mean and matrix equal those of an independent formula in float64."""
    images = np.minimum(photographs(), levels).astype(np.uint8)
    fitted = fit_transform("zca", images, levels, eps=eps)
    mean, matrix = published_zca(images, levels, eps)
    np.testing.assert_allclose(fitted.mean, mean, atol=1e-7)
    np.testing.assert_allclose(fitted.matrix, matrix, rtol=1e-5, atol=1e-6 * np.abs(matrix).max())
    assert np.array_equal(fitted.matrix, fitted.matrix.T)


def test_few_images_give_the_whitening_of_the_covariance() -> None:
    """With fewer images than values, the images' own products give the covariance's whitening to 1e-10 in float64."""
    for count, repeated in ((40, 1), (40, 20), (2, 1), (9, 9)):
        images = np.repeat(photographs(count // repeated), repeated, axis=0)
        total = transform._pixel_sums(images)
        values, vectors = transform._eigenpairs_of_few(images, total, 255, "cpu")
        assert len(values) == count // repeated - 1
        all_values, all_vectors = eigenpairs(transform._covariance(images, total, 255))
        for power, floor in ((-0.5, 0.1), (0.5, 0.1), (-0.5, 1e-3)):
            expected = all_vectors * (np.maximum(all_values, 0) + floor) ** power @ all_vectors.T
            found = vectors * ((values + floor) ** power - floor**power) @ vectors.T + floor**power * np.eye(72)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_whitening_of_few_images_is_small_and_whole() -> None:
    """With fewer images than values, whitening equals the published formula, is inverted, and is stored as factors."""
    images = photographs(20)
    fitted = fit_transform("zca", images, 255)
    mean, matrix = published_zca(images, 255, 0.1)
    np.testing.assert_allclose(fitted.mean, mean, atol=1e-7)
    np.testing.assert_allclose(fitted.matrix, matrix, atol=1e-6 * np.abs(matrix).max())
    others = np.random.default_rng(1).random((30, 3, 4, 6), dtype=np.float32)
    for pixels in (scaled(images), others):
        white = (pixels.reshape(len(pixels), -1) - mean) @ matrix
        np.testing.assert_allclose(fitted.apply(pixels).reshape(white.shape), white, atol=1e-5)
        np.testing.assert_allclose(fitted.invert(fitted.apply(pixels)), pixels, atol=1e-5)
    assert fitted.vectors is not None
    assert fitted.vectors.shape == (72, 19)
    assert fitted.nbytes == transform.FitCost.of("zca", (3, 4, 6), 20).stored
    loaded = Transform.from_arrays(fitted.to_arrays(), json.loads(json.dumps(fitted.to_metadata())))
    assert np.array_equal(loaded.apply(others), fitted.apply(others))
    module: Normaliser = pickle.loads(pickle.dumps(fitted.normaliser()))
    assert torch.equal(module(others), fitted.normalise(others))
    assert fitted.fingerprint == fit_transform("zca", images[::-1].copy(), 255).fingerprint
    images[0, 0, 0, 0] ^= 1
    assert fitted.fingerprint != fit_transform("zca", images, 255).fingerprint
    alike = fit_transform("zca", photographs(1).repeat(3, axis=0), 255)  # no direction at all
    np.testing.assert_allclose(alike.matrix, np.eye(72) / np.sqrt(0.1), rtol=1e-6)
    assert np.isfinite(Transform.from_arrays(alike.to_arrays(), alike.to_metadata()).apply(others)).all()


def test_a_long_fit_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that takes long shows its images, estimate and parts; a short one shows nothing."""
    lines: list[str] = []
    fit_transform("zca", photographs(), 255, say=lines.append)
    assert not lines
    monkeypatch.setattr(transform, "_WORTH_A_LINE", 0)
    fit_transform("zca", photographs(), 255, say=lines.append)
    fit_transform("zca", photographs(9), 255, say=lines.append)
    assert lines == [
        "fitting zca to 300 images of 3x4x6: about 0 s",
        "zca: covariance of 72 x 72",
        "zca: eigenvectors of the covariance, 72 x 72",
        "fitting zca to 9 images of 3x4x6: about 0 s",
        "zca: eigenvectors of a 9 x 9 matrix, as there are fewer images than values",
    ]


def test_zca_whitens_with_the_published_eps() -> None:
    """The default eps is the 0.1 of the published experiments."""
    images = photographs()
    published = fit_transform("zca", images, 255, eps=0.1)
    assert np.array_equal(fit_transform("zca", images, 255).matrix, published.matrix)


def test_whitened_images_have_the_expected_covariance() -> None:
    """Every eigenvalue S of the images' covariance becomes S / (S + eps), which is near 1 for large S."""
    images = photographs()
    white = fit_transform("zca", images, 255, eps=0.01).apply(scaled(images)).reshape(len(images), -1)
    before = np.linalg.eigvalsh(np.cov(scaled(images).reshape(len(images), -1).T.astype(np.float64)))
    after = np.linalg.eigvalsh(np.cov(white.T.astype(np.float64)))
    np.testing.assert_allclose(after, before / (before + 0.01), atol=1e-4)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-5)


def test_standard_gives_each_channel_mean_0_and_deviation_1() -> None:
    """Standard normalisation uses statistics per channel over all images and places."""
    images = photographs()
    normal = fit_transform("standard", images, 255).apply(scaled(images))
    np.testing.assert_allclose(normal.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=(0, 2, 3)), 1, atol=1e-5)


def test_given_statistics_are_used_as_they_are() -> None:
    """Given means and deviations are used instead of the images', and decide the fingerprint alone."""
    images, given = photographs(), ([0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    fitted = fit_transform("standard", images, 255, given=given)
    mean, std = (np.array(each)[:, None, None] for each in given)
    np.testing.assert_allclose(fitted.apply(scaled(images)), (scaled(images) - mean) / std, atol=1e-6)
    np.testing.assert_allclose(fitted.invert(fitted.apply(scaled(images))), scaled(images), atol=1e-6)
    assert fitted.fingerprint == fit_transform("standard", images[:4], 255, given=given).fingerprint
    assert fitted.fingerprint != fit_transform("standard", images, 255).fingerprint
    with pytest.raises(DatasetError, match=r"dataset\.mean has 1 number, and the images have 3 channel"):
        fit_transform("standard", images, 255, given=([0.1], [0.5]))


def test_standard_only_centres_a_constant_channel() -> None:
    """A constant channel is centred and not divided by its zero deviation."""
    images = photographs()
    images[:, 1] = 51
    fitted = fit_transform("standard", images, 255)
    assert fitted.std is not None
    assert fitted.std[1] == 1
    np.testing.assert_allclose(fitted.apply(scaled(images))[:, 1], 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_invert_undoes_apply(kind: Kind) -> None:
    """Inverting restores the pixels, also of images outside the fit."""
    fitted = fit_transform(kind, photographs(), 255)
    images = np.random.default_rng(1).random((20, 3, 4, 6), dtype=np.float32)
    np.testing.assert_allclose(fitted.invert(fitted.apply(images)), images, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_in_chunks_equals_apply_at_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applying in chunks equals applying at once, and leaves the argument unchanged."""
    images = photographs()
    pixels = scaled(images)
    whole = fit_transform(kind, images, 255).apply(pixels)
    monkeypatch.setattr(transform, "_CHUNK_BYTES", 4 * 72 * 7)
    np.testing.assert_allclose(fit_transform(kind, images, 255).apply(pixels), whole, atol=1e-5)
    assert np.array_equal(pixels, scaled(images))


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_an_image_is_normalised_alike(kind: Kind) -> None:
    """Arrays and tensors, floats and bytes, batches and single images, in any layout, give equal values."""
    images = photographs()
    fitted = fit_transform(kind, images, 255)
    expected = torch.from_numpy(fitted.apply(scaled(images)))
    floats, bytes_ = torch.from_numpy(scaled(images)), torch.from_numpy(images)
    frozen = scaled(images)
    frozen.flags.writeable = False
    forms: dict[str, Any] = {
        "float32 tensor": floats,
        "float64 tensor": floats.double(),
        "uint8 tensor": bytes_,
        "uint8 array": images,
        "float64 array": scaled(images).astype(np.float64),
        "read-only array": frozen,
        "array of other strides": np.asfortranarray(scaled(images)),
        "channels-last tensor": floats.to(memory_format=torch.channels_last),
    }
    for name, form in forms.items():
        found = fitted.normalise(form)
        assert (found.dtype, found.device) == (torch.float32, torch.device("cpu")), name
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(fitted.normalise(form[3]), expected[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(fitted.denormalise(expected), floats, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.denormalise(expected[3]), floats[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_leaves_the_cpu_as_it_was(kind: Kind) -> None:
    """Each device has its own copy, made once; that of the CPU shares the arrays' memory before and after."""
    images = torch.from_numpy(photographs())
    fitted = fit_transform(kind, photographs(), 255)
    expected = fitted.normalise(images)
    back = fitted.denormalise(expected)
    for _ in range(2):
        for way in (fitted.normalise, fitted.denormalise):
            assert way(images.float().to("meta")).device.type == "meta"
        assert torch.equal(fitted.normalise(images), expected)
        assert torch.equal(fitted.denormalise(expected), back)
    assert fitted.normaliser().scale.device.type == "cpu"
    assert {device.type for device in fitted._normalisers} == {"cpu", "meta"}
    if kind == "zca":
        assert fitted._normaliser(torch.device("cpu")).scale.data_ptr() == fitted.matrix.ctypes.data


@pytest.mark.parametrize("kind", KINDS)
def test_integers_other_than_bytes_are_refused(kind: Kind) -> None:
    """Integers other than bytes are refused, because their range is unknown."""
    fitted = fit_transform(kind, photographs(), 255)
    for images in (photographs().astype(np.int64), torch.from_numpy(photographs()).long()):
        with pytest.raises(TypeError, match=r"int64: give floats from 0 to 1, or uint8 from 0 to 255"):
            fitted.normalise(images)
    with pytest.raises(TypeError, match=r"not torch\.uint8"):
        fitted.denormalise(torch.from_numpy(photographs()))


@pytest.mark.parametrize("kind", KINDS)
def test_normaliser_is_a_module_like_any_other(kind: Kind) -> None:
    """A normaliser composes, converts, saves and passes gradients like any module; autocast does not change it."""
    images = photographs()
    fitted = fit_transform(kind, images, 255)
    floats = torch.from_numpy(scaled(images))
    expected = fitted.normalise(floats)
    module = fitted.normaliser()
    steps = Compose([torch.from_numpy, module])
    assert torch.equal(steps(scaled(images)), expected)
    model = torch.nn.Sequential(module, torch.nn.Flatten())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(floats), expected.flatten(1))
    wide = copy.deepcopy(module).double()(floats)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, atol=1e-5, rtol=0)
    assert copy.deepcopy(module).to("meta")(floats.to("meta")).device.type == "meta"
    leaf = floats[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf)[0, 0, 0, 0], leaf)
    assert not gradient[1].any()
    flat = torch.func.jacrev(module)(floats[:1]).reshape(72, 72)
    torch.testing.assert_close(gradient[0].flatten(), flat[0])
    module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    assert torch.equal(fitted.normalise(floats), expected)
    assert isinstance(module, Normaliser)


def test_a_whitening_matrix_of_an_earlier_version_still_whitens() -> None:
    """A stored whitening matrix without eigenvectors whitens and inverts bit for bit as before."""
    images = photographs()
    fitted = fit_transform("zca", images, 255)
    metadata = {name: value for name, value in fitted.to_metadata().items() if name != "eps"}
    old = Transform.from_arrays({"mean": fitted.mean, "matrix": fitted.matrix}, metadata)
    assert np.array_equal(old.apply(scaled(images)), fitted.apply(scaled(images)))
    np.testing.assert_allclose(old.invert(old.apply(scaled(images))), scaled(images), atol=1e-5)
    assert list(old.to_arrays()) == ["mean", "matrix"]
    assert old.digest != fitted.digest


@pytest.mark.parametrize("kind", KINDS)
def test_digest_is_that_of_the_bits(kind: Kind) -> None:
    """The digest survives pickling without caches, and changes with every array and setting."""
    fitted = fit_transform(kind, photographs(), 255)
    fitted.apply(scaled(photographs()))
    size, copied = len(pickle.dumps(fitted)), pickle.loads(pickle.dumps(fitted))
    assert fitted.nbytes < size < fitted.nbytes + 2000
    assert copied.digest == Transform.from_arrays(fitted.to_arrays(), fitted.to_metadata()).digest == fitted.digest
    assert len(fitted.digest) == 32
    for name, array in fitted.to_arrays().items():
        other = fitted.to_arrays() | {name: np.nextafter(array, 2)}
        assert Transform.from_arrays(other, fitted.to_metadata()).digest != fitted.digest
    assert dataclasses.replace(fitted, fingerprint="other").digest != fitted.digest


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_are_no_problem(kind: Kind) -> None:
    """Normalising an empty set gives an empty set."""
    fitted = fit_transform(kind, photographs(), 255)
    nothing = np.empty((0, 3, 4, 6), dtype=np.float32)
    assert fitted.invert(fitted.apply(nothing)).shape == nothing.shape


def test_sums_are_exact_over_several_chunks() -> None:
    """Sums over several chunks of extreme pixels have no rounding."""
    images = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (2500, 1, 2, 3))
    images[:1100] = 0
    centred = images.reshape(2500, 6).astype(np.int64) - 128
    assert np.array_equal(transform._exact_products(images), centred.T @ centred)
    assert np.array_equal(transform._pixel_sums(images), centred.sum(axis=0))


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_that_of_the_statistics(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint ignores the images' order and chunks, and changes with any pixel, level or eps."""
    images = photographs()
    first = fit_transform(kind, images, 255).fingerprint
    monkeypatch.setattr(transform, "_EXACT_ROWS", 100)
    monkeypatch.setattr(transform, "_CHUNK_BYTES", 1)
    assert fit_transform(kind, images[::-1].copy(), 255).fingerprint == first
    assert fit_transform(kind, images, 254).fingerprint != first
    images[0, 0, 0, 0] ^= 1
    assert fit_transform(kind, images, 255).fingerprint != first


def test_fingerprint_tells_eps_and_kind_apart() -> None:
    """Another eps or kind on equal images gives another fingerprint."""
    fitted = [fit_transform("zca", photographs(), 255, eps=eps) for eps in (0.1, 0.2)]
    fitted.append(fit_transform("standard", photographs(), 255))
    assert len({one.fingerprint for one in fitted}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_and_json_carry_a_transform(kind: Kind) -> None:
    """Named arrays and JSON carry a transform bit for bit."""
    images = photographs()
    fitted = fit_transform(kind, images, 255)
    loaded = Transform.from_arrays(fitted.to_arrays(), json.loads(json.dumps(fitted.to_metadata())))
    assert (loaded.kind, loaded.shape, loaded.fingerprint) == (kind, (3, 4, 6), fitted.fingerprint)
    assert np.array_equal(loaded.apply(scaled(images)), fitted.apply(scaled(images)))
    assert np.array_equal(loaded.invert(scaled(images)), fitted.invert(scaled(images)))


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"vectors": None}, {}, "vectors"),
        ({"values": np.full(72, -1.0)}, {}, "eigenvalue is negative"),
        ({"values": np.ones(5)}, {}, r"vectors has shape \(72, 72\), not \(72, 5\)"),
        ({"values": np.ones(73)}, {}, r"values has shape \(73,\), not \(72,\)"),
        ({"vectors": np.full((72, 72), np.nan)}, {}, "vectors holds values that are not finite"),
        ({}, {"eps": 0}, r"eps is 0\.0"),
        ({}, {"shape": [-1, -4, 6]}, "its images are -1x-4x6"),
        ({"mean": np.zeros(5)}, {}, r"mean has shape \(5,\), not \(72,\)"),
        ({}, {"kind": "pca"}, "pca"),
        ({}, {"shape": [3, 4]}, "ValueError"),
        ({}, {"fingerprint": None}, "fingerprint"),
    ],
)
def test_damaged_transform_is_refused(arrays: dict[str, Any], metadata: dict[str, Any], message: str) -> None:
    """A missing (None) or altered part of a transform is an error that names it."""
    fitted = fit_transform("zca", photographs(), 255)
    arrays = {name: value for name, value in (fitted.to_arrays() | arrays).items() if value is not None}
    metadata = {name: value for name, value in (fitted.to_metadata() | metadata).items() if value is not None}
    with pytest.raises(CorruptFileError, match=rf"the transform in x\.arrow is unusable .*{message}"):
        Transform.from_arrays(arrays, metadata, "x.arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_shape_are_refused(kind: Kind) -> None:
    """Images of another shape are an error that names both, also where a channel axis would broadcast."""
    fitted = fit_transform(kind, photographs(), 255)
    for use in (fitted.apply, fitted.invert):
        with pytest.raises(DatasetError, match=r"\(1, 4, 6\) meet a .* fitted on \(3, 4, 6\)"):
            use(np.zeros((2, 1, 4, 6), dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_refuses_a_single_image(kind: Kind) -> None:
    """A single image has no variance, so fitting to it is an error."""
    with pytest.raises(DatasetError, match="too small"):
        fit_transform(kind, photographs(1), 255)


@pytest.mark.gpu
def test_fitting_on_a_gpu_gives_the_same_transform() -> None:
    """Fitting on a GPU changes only rounding, and not the fingerprint."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    host, device = (fit_transform("zca", photographs(), 255, device=name) for name in ("cpu", "cuda"))
    assert host.fingerprint == device.fingerprint
    np.testing.assert_allclose(host.matrix, device.matrix, rtol=1e-5, atol=1e-6)


def test_another_device_takes_torchs_decomposition_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path, run on the CPU, agrees with numpy's decomposition. This process starts no CUDA for it."""
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("this process computes"))
    monkeypatch.setattr(patience, "_HERE", 0)
    host, other = (fit_transform("zca", photographs(), 255, device=name) for name in ("cpu", "cpu:0"))
    np.testing.assert_allclose(host.matrix, other.matrix, rtol=1e-5, atol=1e-6)


def test_a_gpu_that_fails_leaves_the_fit_to_the_cpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit whose device fails gives the CPU's transform, and one line says why."""
    monkeypatch.setattr(patience, "_HERE", 0)
    host, other = (fit_transform("zca", photographs(), 255, device=name) for name in ("cpu", "absent"))
    assert (other.values.tobytes(), other.vectors.tobytes()) == (host.values.tobytes(), host.vectors.tobytes())
    (message,) = caplog.messages
    assert re.match(r"zca is fitted on the CPU instead of the GPU: .*device.*absent", message)
