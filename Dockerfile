# CPU:   docker build -t lora_tuner .
# CUDA:  docker build -t lora_tuner:cuda --build-arg TORCH=cu130 .    (untried; any folder of https://download.pytorch.org/whl)
# Run:   docs/serving.md#docker
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lora_tuner
COPY constraints.txt /src/
# The layer of PyTorch is the largest, and changes with its version alone.
RUN /opt/lora_tuner/bin/pip install -c /src/constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY pyproject.toml README.md LICENSE /src/
COPY lora_tuner /src/lora_tuner
RUN /opt/lora_tuner/bin/pip install -c /src/constraints.txt '/src[documents,gguf,quantized,report,serve]'

FROM python:${PYTHON}-slim
# The kernels of the CPU are compiled on first use, for the CPU of the machine.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd lora && install -d -m 1777 /cache /work
COPY --from=build /opt/lora_tuner /opt/lora_tuner
# Home and name are those of any user that `docker run --user` takes, whom the image may not know.
ENV PATH=/opt/lora_tuner/bin:$PATH HOME=/cache USER=lora PYTHONUNBUFFERED=1
USER lora
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/health', timeout=5)"]
ENTRYPOINT ["lora-tuner"]
CMD ["serve", "--host", "0.0.0.0"]
