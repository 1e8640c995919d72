"""A super-network with everything that is known about it: made, opened, cut, saved.

The example of the README, on the digits that `sh run_demo.sh` trains:

>>> from PIL import Image
>>> import supernet
>>> net = supernet.load("output/demo/peelable/digits", use_ema=True)  # or a checkpoint, or a sub-network's folder
>>> code = net.select(max_macs=200e3, max_memory=60e3)  # the largest size within both; memory in bytes
>>> small = net.cut(code)  # plain timm modules
>>> logits = small(net.read(Image.open("digit.png"))[None])
>>> print(net.macs(code) <= 200e3, logits.shape)
True torch.Size([1, 10])
>>> config = net.save("output/cut", small, op_code=code)  # supernet.load("output/cut") opens it
"""

from .contraction import contract
from .network import Network
from .opening import create, load

__all__ = ["Network", "contract", "create", "load"]
