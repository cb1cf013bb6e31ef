# A server of a model in a mounted folder (docs/serve.md). CPU: docker build -t dream_jax .
# NVIDIA: docker build -t dream_jax --build-arg EXTRAS=serve,cuda .   and docker run --gpus all; the driver must be 580 or newer.
# Status: not built, for lack of a Docker daemon on this project's machines. On 2026-11-30 its steps were run by hand with Python 3.11: the files that it
# copies, pip with EXTRAS=serve, which took 1.3 GB, and then the server, as a process without rights to write to its folder: it answered, the command of
# the health check found it, and SIGTERM ended it. For EXTRAS=serve,cuda, pip found a consistent set of releases (CUDA 13).
FROM python:3.13-slim
ARG EXTRAS=serve
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE serve.py ./
COPY dream_jax dream_jax
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[$EXTRAS]" && useradd --create-home dream
USER dream
EXPOSE 8000
# Healthy while the server takes requests at the default port; loading a large model may take minutes.
HEALTHCHECK --start-period=10m CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["python", "serve.py"]
CMD ["--help"]
