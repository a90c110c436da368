"""The three networks of face-api: detector, landmarks, descriptor.

Parameters have the names and the layout of its files: filters are [height, width, in, out], those
of one channel each [height, width, channels, 1]. Pictures are [1, 3, size, size], RGB, 0 to 255.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DETECTOR_SIZE, LANDMARKS_SIZE, DESCRIPTOR_SIZE = 416, 112, 150  # pixels of a side
_DETECTOR_MEAN = (117.001, 114.697, 97.404)
_FACE_MEAN = (122.782, 117.001, 104.298)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _normalized(pixels: torch.Tensor, mean: tuple[float, float, float]) -> torch.Tensor:
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / 255


class _Filters(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.filters = _weight(size, size, inputs, outputs)
        self.bias = _weight(outputs)

    def forward(self, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return F.conv2d(x, self.filters.permute(3, 2, 0, 1), self.bias, stride, padding)


class _Separable(nn.Module):
    """A filter for each channel, then a mixture of the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise_filter = _weight(3, 3, inputs, 1)
        self.pointwise_filter = _weight(1, 1, inputs, outputs)
        self.bias = _weight(outputs)

    def forward(self, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        each = self.depthwise_filter.permute(2, 3, 0, 1)
        x = F.conv2d(_padded(x, stride), each, None, stride, groups=x.shape[1])
        return F.conv2d(x, self.pointwise_filter.permute(3, 2, 0, 1), self.bias)


def _padded(x: torch.Tensor, stride: int) -> torch.Tensor:
    """For a 3 x 3 filter, as TensorFlow pads: with stride 2 and an even size only at the end."""
    return F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


class FaceDetector(nn.Module):
    """Cells of 32 pixels with five anchors each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = _Filters(3, 16, 3)
        for layer in range(1, 6):
            setattr(self, f"conv{layer}", _Separable(8 * 2**layer, 16 * 2**layer))
        self.conv8 = _Filters(512, 25, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, 416, 416] -> [13, 13, 5, 5]: row, column, anchor, (x, y, width, height, score)."""
        x = F.leaky_relu(self.conv0(_normalized(pixels, _DETECTOR_MEAN)), 0.1)
        for layer in range(1, 6):
            x = F.max_pool2d(x, 2, ceil_mode=True)
            x = F.leaky_relu(getattr(self, f"conv{layer}")(x), 0.1)
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1)
        return self.conv8(x)[0].permute(1, 2, 0).unflatten(2, (5, 5))


class _DenseBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.conv0 = _Filters(inputs, outputs, 3) if first else _Separable(inputs, outputs)
        self.conv1, self.conv2, self.conv3 = (_Separable(outputs, outputs) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.conv0, _Filters):
            x = F.relu(self.conv0(_padded(x, 2), 2))
        else:
            x = F.relu(self.conv0(x, 2))
        total, step = x, x
        for layer in (self.conv1, self.conv2, self.conv3):
            total = total + layer(step)
            step = F.relu(total)
        return step


class _Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weights = _weight(inputs, outputs)
        self.bias = _weight(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights + self.bias


class FaceLandmarks(nn.Module):
    """68 points of a face."""

    def __init__(self) -> None:
        super().__init__()
        self.dense0 = _DenseBlock(3, 32, first=True)
        for block in range(1, 4):
            setattr(self, f"dense{block}", _DenseBlock(16 * 2**block, 32 * 2**block, first=False))
        self.fc = _Linear(256, 136)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, 112, 112] -> [68, 2], x and y as shares of the side."""
        x = _normalized(pixels, _FACE_MEAN)
        for block in range(4):
            x = getattr(self, f"dense{block}")(x)
        return self.fc(x.mean((2, 3)))[0].unflatten(0, (68, 2))


class _Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = _weight(channels)
        self.biases = _weight(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights[:, None, None] + self.biases[:, None, None]


class _Scaled(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 3) -> None:
        super().__init__()
        self.conv = _Filters(inputs, outputs, size)
        self.scale = _Scale(outputs)

    def forward(self, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return self.scale(self.conv(x, stride, padding))


class _Residual(nn.Module):
    """Two layers beside a shortcut; `down` halves the size and may add channels."""

    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Scaled(inputs, outputs), _Scaled(outputs, outputs)
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(x, 2) if self.down else self.conv1(x, padding=1)
        out = self.conv2(F.relu(out), padding=1)
        short = F.avg_pool2d(x, 2) if self.down else x
        # The layers may lose a row and a column, the shortcut has fewer channels: zeros for both.
        missing = short.shape[2] - out.shape[2]
        out = F.pad(out, (0, missing, 0, missing))
        short = F.pad(short, (0, 0, 0, 0, 0, out.shape[1] - short.shape[1]))
        return F.relu(out + short)


class FaceDescriptor(nn.Module):
    """dlib's residual network for faces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv32_down = _Scaled(3, 32, 7)
        channels = 32
        self.blocks = (
            *("conv32_1", "conv32_2", "conv32_3"),
            *("conv64_down", "conv64_1", "conv64_2", "conv64_3"),
            *("conv128_down", "conv128_1", "conv128_2"),
            *("conv256_down", "conv256_1", "conv256_2", "conv256_down_out"),
        )
        for name in self.blocks:
            outputs = int(name.split("_")[0].removeprefix("conv"))
            setattr(self, name, _Residual(channels, outputs, "down" in name))
            channels = outputs
        self.fc = _weight(256, 128)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, 150, 150] -> [128]."""
        x = F.relu(self.conv32_down(_normalized(pixels, _FACE_MEAN), 2))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return (x.mean((2, 3)) @ self.fc)[0]
