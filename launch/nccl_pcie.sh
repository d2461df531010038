# Opt-in NCCL settings for GPUs that talk over PCIe, to be sourced before a launch:
#
#   source launch/nccl_pcie.sh && ./launch/train_2xl40s.sh --phase 1
#
# Needed only where the first all-reduce hangs (all GPUs at 100 %, no memory traffic): PCIe access
# control (ACS) or an IOMMU then redirects peer-to-peer traffic. Peer-to-peer off is the workaround;
# ACS off in the BIOS is the cure. Elsewhere it costs bandwidth, so it is no default.
export NCCL_P2P_DISABLE=1

# Only where /dev/shm is too small for NCCL ("Error while creating shared memory segment") and
# cannot be enlarged (docker: --shm-size=1g): it sends everything through sockets, which is slow.
# export NCCL_SHM_DISABLE=1
