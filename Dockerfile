# The image that GKE (gke.sh) and Vertex AI (xmanager.py) run:
#   docker build --file launch/Dockerfile --build-arg EXTRA=tpu --tag IMAGE .
FROM python:3.12-slim
# cuda12 (or cuda13) for GPUs, tpu for TPUs
ARG EXTRA=cuda12
WORKDIR /starflow_jax
COPY . .
RUN pip install --no-cache-dir --requirement requirements.txt "jax[$EXTRA]"
ENTRYPOINT ["bash", "launch/worker.sh", "run"]
