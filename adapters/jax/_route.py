"""How calls on a GPU get to the kernels: compiled into XLA's program (`_compiled`), or through a handler (`_gpu`)."""

from __future__ import annotations

import os
from typing import NamedTuple

from cuflash.adapters.jax import _compiled
from cuflash.cuda.toolchain import toolchain
from cuflash.errors import UnsupportedError

VARIABLE = "CUFLASH_JAX_ROUTE"
_ROUTES = ("compiled", "handler")


class Route(NamedTuple):
    name: str  # "compiled" or "handler"
    reason: str  # why it was chosen
    gpu: _compiled.Gpu | None  # what the compiled route compiles for


def route() -> Route:
    """The route of calls that are lowered for a GPU from now on.

    The variable CUFLASH_JAX_ROUTE names it; without it the compiled one, where it is known to work. ValueError for
    another value, UnsupportedError where the compiled one is asked for and cannot be had.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, *_ROUTES):
        raise ValueError(f"{VARIABLE} is {wanted!r}; allowed are {', '.join(_ROUTES)}, or to leave it unset")
    if wanted == "handler":
        return Route("handler", f"{VARIABLE} asks for it", None)
    reason = _compiled.obstacle(tried_only=wanted is None)
    gpu = None
    if reason is None:
        try:
            toolchain()  # `cuflash compile` makes the kernels as the handler launches them
            gpu = _compiled.gpu()
        except UnsupportedError as error:
            reason = str(error)
    if reason is None:
        return Route("compiled", f"{VARIABLE} asks for it" if wanted else "jaxlib launches kernels by itself", gpu)
    if wanted:
        raise UnsupportedError(f"{VARIABLE} is {wanted!r}, but {reason}; unset it, or set it to 'handler'")
    return Route("handler", reason, None)
