"""Tables of rotary embeddings are made once and used again."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]


def kept(size: int) -> Callable[[Callable[..., Table]], Callable[..., Table]]:
    """Keep the last ``size`` tables that a function of hashable arguments made.

    Only real tensors are kept: what is made while shapes alone are traced (``make show`` estimates memory so) would poison
    a training in the same process. Tables are made outside inference mode, since those made in validation serve training.
    """

    def decorate(function: Callable[..., Table]) -> Callable[..., Table]:
        tables: OrderedDict[tuple, Table] = OrderedDict()

        @wraps(function)
        def wrapped(*arguments: Hashable, **named: Hashable) -> Table:
            key = (arguments, tuple(sorted(named.items())))
            if key in tables:
                tables.move_to_end(key)
                return tables[key]
            with torch.inference_mode(False):
                made = function(*arguments, **named)
            if all(type(part) is Tensor for part in made):
                tables[key] = made
                if len(tables) > size:
                    tables.popitem(last=False)
            return made

        return wrapped

    return decorate
