# megarlhf on NVIDIA's PyTorch image, which brings CUDA, NCCL, Transformer Engine and Apex built for its own PyTorch.
#
#   docker build -t megarlhf .
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" megarlhf \
#     bash launcher/ppo_1.3b.sh
#
# --ipc=host: NCCL exchanges between the GPUs of a node through shared memory, of which docker gives 64 MB. The user is 1000:1000;
# where the mounted folders belong to another, add --user "$(id -u):$(id -g)".

# torch 2.14.0a0, CUDA 13.4, NCCL 2.31.2, Transformer Engine 2.19.0, Python 3.12
FROM nvcr.io/nvidia/pytorch:26.09-py3 AS base

FROM base AS build
# The image names a constraints file of its own in PIP_CONSTRAINT; ours takes its place.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY launcher/docker-constraints.txt /build/constraints.txt
COPY setup.py pyproject.toml README.md LICENSE /build/
COPY megarlhf /build/megarlhf
# An environment on top of the image's packages, pip among them, so that its torch is seen and kept; were that replaced, or one of
# what the image is taken for missing, the build ends here.
RUN python3 -m venv --system-site-packages --without-pip /opt/megarlhf \
    && /opt/megarlhf/bin/python -m pip install --constraint /build/constraints.txt "/build[gpu,wandb,tensorboard]" \
    && /opt/megarlhf/bin/python -c "import torch; assert not torch.__file__.startswith('/opt/megarlhf'), torch.__file__" \
    && /opt/megarlhf/bin/python -c "import importlib.util; assert all(map(importlib.util.find_spec, \
       ('apex', 'transformer_engine', 'megatron', 'megarlhf', 'nvidia.dali')))"

FROM base AS run
COPY --from=build /opt/megarlhf /opt/megarlhf
COPY launcher /workspace/launcher
COPY examples /workspace/examples
COPY tools /workspace/tools
# One interpreter for all that starts the program: PYTHON is the launchers'.
ENV PATH="/opt/megarlhf/bin:$PATH" PYTHON=/opt/megarlhf/bin/python HOME=/workspace
WORKDIR /workspace
RUN mkdir -p data runs && chown -R 1000:1000 /workspace
USER 1000:1000
# Healthy: the versions fit, a GPU answers, and there is room to write.
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m --retries=2 \
    CMD ["megarlhf", "doctor", "--quick", "--gpu"]
CMD ["megarlhf", "--help"]
