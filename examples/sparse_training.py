"""A dense network made 2:4 on both axes by two epochs of sparse training in a plain torch loop, then compiled."""

from __future__ import annotations

import copy
import time

import digits
import numpy as np
import torch

import bitwright as bw

torch.set_num_threads(1)
torch.manual_seed(0)
start = time.perf_counter()
data = digits.load()
images, labels = data.test_x.numpy(), data.test_y.numpy()


def accuracy(net: digits.Net) -> float:
    with torch.no_grad():
        return float((net.eval()(data.test_x).argmax(1) == data.test_y).double().mean())


net = digits.Net()
digits.train(net, data, 3, 4e-3, lambda: None, lambda epoch, loss: None)
print(f"dense: accuracy {accuracy(net):.4f}, {time.perf_counter() - start:.0f} s")

one_shot = copy.deepcopy(net)
bw.sparse_training(one_shot, "2:4", transposable=True).finish()
print(f"masked without training: accuracy {accuracy(one_shot):.4f}")

with bw.sparse_training(net, "2:4", transposable=True, refresh_every=7) as training:
    for name, why in training.refused.items():
        print(f"left dense: {name}, {why}")

    def after_epoch(epoch: int, loss: float) -> None:
        print(f"epoch {epoch}: loss {loss:.3f}, last refresh changed {training.flip_rate:.2%} of the mask bits")
        if epoch == 0:
            training.freeze()  # the last epoch trains what is kept

    digits.train(net, data, 2, 1e-3, training.step, after_epoch)
print(f"sparse: accuracy {accuracy(net):.4f}, {time.perf_counter() - start:.0f} s")

program = bw.compile(bw.capture(net, (data.x[:2],), dynamic_batch=True, name="digits"))
found = np.concatenate([program(part) for part in np.array_split(images, 15)]).argmax(1)
print(f"compiled: accuracy {float((found == labels).mean()):.4f}, {time.perf_counter() - start:.0f} s")
for layer in program.report.layers:
    if layer.pattern:
        print(f"  {layer.name}: {layer.pattern}, kernel {layer.kernel}")
