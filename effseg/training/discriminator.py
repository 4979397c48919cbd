"""The network that tells what a segmenter made of cases it was trained on from all others."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from effseg.plans import AdversarialConfig
from effseg.types import Features

SLOPE = 0.2
"""Of leaky ReLU below zero, as discriminators have it: Radford et al. 2016, arXiv:1511.06434."""


class Discriminator(nn.Module):
    """Image and label probabilities to one number: above 0, the segmenter knew this case.

    Convolutions of stride 2, their channels doubled each time, then the mean over what is left of
    the patch. The first reads image and probabilities apart and adds what it makes of them: a
    convolution over `cat(image, probabilities)` without the copy. There is no norm: how sure
    a segmenter is, is what tells most, and a norm would take it out.

    Seeing the image beside its labels: Luc et al. 2016, arXiv:1611.08408, and Zhang et al., "Deep
    adversarial networks for biomedical image segmentation utilizing unannotated images", 2017.

    Args:
        in_channels: of the image.
        n_classes: of the probabilities.
        config: channels and depth.
    """

    def __init__(self, in_channels: int, n_classes: int, config: AdversarialConfig) -> None:
        super().__init__()
        width = config.channels
        self.of_image = _halving(in_channels, width)
        self.of_labels = _halving(n_classes, width, bias=False)
        self.deeper = nn.ModuleList()
        for _ in range(config.depth - 1):
            self.deeper.append(_halving(width, 2 * width))
            width *= 2
        self.verdict = nn.Linear(width, 1)
        for part in self.modules():
            if isinstance(part, nn.Conv3d):
                nn.init.kaiming_normal_(part.weight, a=SLOPE)

    def forward(self, image: Features, probabilities: Features) -> Float[Tensor, " batch"]:
        """(N, C, z, y, x) and (N, classes, z, y, x) -> logits (N,)."""
        x = F.leaky_relu(self.of_image(image) + self.of_labels(probabilities), SLOPE)
        for convolution in self.deeper:
            x = F.leaky_relu(convolution(x), SLOPE)
        verdict: Tensor = self.verdict(x.mean((2, 3, 4)))
        return verdict[:, 0]


def surprise(verdicts: Float[Tensor, " batch"], *, known: bool) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of verdicts in nats, the truth being `known` or not."""
    return F.softplus(-verdicts.float() if known else verdicts.float()).mean()


def probabilities_of(outputs: Tensor | list[Tensor]) -> Tensor:
    """Softmax of a segmenter's logits; of the finest where it gives several."""
    logits = outputs[0] if isinstance(outputs, list) else outputs
    return torch.softmax(logits.float(), dim=1)


def _halving(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 3, stride=2, padding=1, bias=bias)
