import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kornia.losses import LovaszSoftmaxLoss

dist.init_process_group()
rank = dist.get_rank()
torch.manual_seed(rank)  # other images in each process
device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"  # on one machine
network = DistributedDataParallel(torch.nn.Conv2d(3, 4, 3, padding=1).to(device))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
# The process group must exist before the loss.
criterion = LovaszSoftmaxLoss(
    classes="present",
    per_image=False,
    num_bins=1024,
    process_group=dist.group.WORLD,
)

for _ in range(2):
    images, labels = torch.rand(2, 3, 16, 16), torch.randint(0, 4, (2, 16, 16))
    loss = criterion(network(images.to(device)), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
# The same number in each process:
print(f"process {rank}: loss {loss.item():.6f}")
dist.destroy_process_group()
