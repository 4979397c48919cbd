"""What backward passes written by hand cannot give."""

import torch


def refuse_second_derivative(of: str, instead: str) -> None:
    """Raise in a backward that is itself to be differentiated.

    torch's `once_differentiable` stays silent where the incoming gradient is a constant, and the
    second derivative would be wrong.

    Args:
        of: what has none.
        instead: the way to one.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{of} has no second derivative (create_graph=True); {instead} for it")
