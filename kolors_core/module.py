"""A module that stands in another's place, such as a layer with adapters in that of a plain one."""

from torch import nn


class StandIn(nn.Module):
    """A module in another's place, with its very parameters, sizes, mode and hooks; `plain` is that other."""

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(base))  # the parameters are taken over, none is made
        self._parameters, self._modules = dict(base._parameters), {}
        self.base = (base,)  # in a tuple, since it is no submodule

    def plain(self) -> nn.Module:
        """The very module that this one replaced, with the present parameters."""
        base = self.base[0]
        base._parameters.update(self._parameters)
        return base.train(self.training)
