"""A network's tensors by name, each once."""

from torch import Tensor, nn


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict, without the further names of tensors that a network holds more than once.

    Some networks register a part under two names (MONAI's DynUNet does). A file then holds it
    under the first, and `load_state_dict(..., strict=False)` of it sets both.
    """
    state = network.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor.detach() for name, tensor in state.items() if first[id(tensor)] == name}
