# mindsigma in a container. For a CPU:
#
#     docker build -t mindsigma:0.2.0 . && mkdir -p outputs
#     docker run --rm --user "$(id -u)" -v "$PWD/outputs:/outputs" mindsigma:0.2.0 \
#         mindsigma-generate "a penguin on a yellow background" --out /outputs
#     docker run --rm -p 127.0.0.1:7860:7860 mindsigma:0.2.0 mindsigma-web --host 0.0.0.0
#
# Tried on 2026-11-29 with buildah 1.28.2 in place of Docker, and in place of BASE, which no registry could be asked for,
# Debian 12 with its own Python 3.11 by debootstrap: it was built (4.0 GB), drew the first command's picture as user
# 12345, answered as a page, and ended at SIGTERM with code 0.
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

# Whatever user --user names may write there; the sticky bit keeps each one's files.
RUN useradd --create-home user && mkdir /outputs && chmod 1777 /outputs /home/user
ENV HOME=/home/user
USER user
EXPOSE 7860
CMD ["mindsigma-generate", "--help"]
