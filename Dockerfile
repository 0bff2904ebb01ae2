# mindsigma in a container; written without a Docker at hand, so it was not built. For a CPU:
#
#     docker build -t mindsigma:0.2.0 . && docker run --rm -v "$PWD/outputs:/outputs" mindsigma:0.2.0 \
#         mindsigma-generate "a penguin on a yellow background" --out /outputs
#
# For an NPU, give an image with CANN and Python 3.9 to 3.11 as BASE, such as quay.io/ascend/cann, and start the
# container with the devices (/dev/davinci0 ..., /dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc) and the host's
# driver (-v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro), or with Ascend Docker Runtime. Not tried on an NPU.
ARG BASE=python:3.11-slim
FROM ${BASE}

# The compiler is for the kernels of a CPU (mindsigma/backends/README.md); without it they are left out, with a word.
RUN apt-get update && apt-get install -y --no-install-recommends g++ procps && rm -rf /var/lib/apt/lists/*

WORKDIR /mindsigma
COPY pyproject.toml README.md LICENSE ./
COPY mindsigma mindsigma
COPY tools tools
COPY configs configs
RUN pip install --no-cache-dir ".[web]"

RUN useradd --create-home user && mkdir /outputs && chown user /outputs
USER user
EXPOSE 7860
CMD ["mindsigma-generate", "--help"]
