"""What clients are told of the model, of sessions and of the API itself."""

import dataclasses
import json
from typing import Any

from starflow_jax.config import Config, Serve
from starflow_jax.model.codec import frame_size, pixel_frames
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.sampling.record import record_text
from starflow_jax.sampling.session import Session

DIGITS = ("a blue three moves right", "a red seven moves left", "a green two drifts to the upper left",
          "a yellow five moves up", "a white nine moves down")


def examples(config: Config) -> list[str]:
    """Prompts that a model of moving digits knows; of others none are known."""
    return list(DIGITS) if config.data.source == "digits" and config.text.encoder != "frozen" else []


def model_facts(model: Model, settings: Serve) -> dict[str, Any]:
    """What the page needs to know before a session."""
    config = model.config
    height, width = frame_size(config)
    scale = shown_scale(height)
    return {"name": config.name, "examples": examples(config), "fps": file_rate(config), "height": height * scale,
            "width": width * scale, "time_stride": config.codec.time_stride, "frames": pixel_frames(config),
            "most_frames": settings.frames, "guidance": config.sample.guidance, "steerable": "control" in model.params,
            "prompt_bytes": settings.prompt_bytes, "upload_bytes": settings.upload_bytes}


def record_of(session: Session) -> dict[str, Any]:
    """The JSON from which `Model.replay` makes what a session has shown again. The model is called by its config's
    name: where it lies on the server is nobody's business."""
    record = dataclasses.replace(session.record, model=session.config.name)
    return json.loads(record_text(record, session.config.codec.time_stride))


def _answer(description: str, schema: dict[str, Any] | None = None, kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema or {"$ref": "#/components/schemas/Error"}}}}


def openapi(settings: Serve) -> dict[str, Any]:
    """The HTTP API in OpenAPI 3.1."""
    schemas = {"Asked": _asked(settings), "Job": _job(), "Error": {
        "type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}
    return {"openapi": "3.1.0", "info": {"title": "starflow_jax", "version": "1"}, "paths": _paths(),
            "security": [{}, {"token": []}], "components": {
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}, "schemas": schemas}}


def _asked(settings: Serve) -> dict[str, Any]:
    """What the body of a request may hold, as serving/asked.py reads it."""
    return {
        "type": "object", "required": ["prompt"], "additionalProperties": False, "properties": {
            "prompt": {"type": "string", "maxLength": settings.prompt_bytes, "pattern": "^[^\\u0000]*$",
                       "description": f"what the video shows; at most {settings.prompt_bytes} bytes"},
            "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0},
            "frames": {"type": "integer", "minimum": 0, "maximum": settings.frames,
                       "description": "1 + a multiple of the model's time stride; 0: the training length"},
            "guidance": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
            "camera": {"description": "moves such as pan_right:12, or a pose, world to camera", "oneOf": [
                {"type": "string", "maxLength": 200}, {"type": "null"},
                {"type": "array", "minItems": 3, "maxItems": 3, "items": {
                    "type": "array", "minItems": 4, "maxItems": 4, "items": {"type": "number"}}}]},
            "image": {"type": ["string", "null"], "contentEncoding": "base64",
                      "description": "a picture file: the first frame"},
            "video": {"type": ["string", "null"], "contentEncoding": "base64", "description":
                      "or a video file, whose end is the first frames; these count among frames"},
            "surprise": {"type": "boolean", "default": False, "description":
                         "of a job: tell bits_per_dimension, the video's exact -log p"}}}


def _job() -> dict[str, Any]:
    """What `Job.facts` tells."""
    return {"type": "object", "required": ["id", "status", "prompt", "seed", "frames", "frames_made", "url"],
            "properties": {
                "id": {"type": "string"}, "status": {"enum": ["queued", "running", "done", "failed"]},
                "prompt": {"type": "string"}, "seed": {"type": "integer"}, "frames": {"type": "integer"},
                "frames_made": {"type": "integer"}, "url": {"type": "string"}, "place": {"type": "integer"},
                "error": {"type": "string"}, "record": {"type": "object"}, "bits_per_dimension": {"type": "number"}}}


def _paths() -> dict[str, Any]:
    """What answers which request."""
    links = {operation: {"operationId": operation, "parameters": {"id": "$response.body#/id"}}
             for operation in ("getVideo", "deleteVideo")}
    name = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    of_job, video = {"$ref": "#/components/schemas/Job"}, {"type": "string", "contentMediaType": "video/mp4"}
    refusals = {"401": _answer("a token is needed"), "403": _answer("another origin"), "421": _answer("another host")}
    return {
        "/v1/videos": {"post": {
            "operationId": "makeVideo", "summary": "Make a video: streamed with Accept: video/mp4, else as a job",
            "requestBody": {"required": True, "content": {"application/json": {
                "schema": {"$ref": "#/components/schemas/Asked"}}}},
            "responses": {**refusals, "200": _answer("the MP4 while it is made", video, "video/mp4"),
                          "202": {**_answer("a job", of_job), "links": links}, "408": _answer("the body did not come"),
                          "413": _answer("too large"), "422": _answer("what can't be, in words"),
                          "429": _answer("too many in a minute"), "500": _answer("it failed, in words"),
                          "503": _answer("no place")}}},
        "/v1/videos/{id}": {"parameters": name, "get": {
            "operationId": "getVideo", "summary": "A job; with Accept: video/mp4 its video",
            "responses": {**refusals, "200": {"description": "the job, or its video", "content": {
                "application/json": {"schema": of_job}, "video/mp4": {"schema": video}}},
                "404": _answer("no such video"), "409": _answer("the video is not done")}},
            "delete": {"operationId": "deleteVideo", "summary": "End the job and delete its video", "responses": {
                **refusals, "204": {"description": "it is gone"}, "404": _answer("no such video")}}},
        "/v1/model": {"get": {"operationId": "getModel", "summary": "What the model can do", "responses": {
            **refusals, "200": _answer("facts", {"type": "object"})}}},
        "/healthz": {"get": {"operationId": "health", "summary": "Whether sessions can begin at once", "responses": {
            "421": refusals["421"], **{code: _answer(words, {"type": "object"}) for code, words in (
                ("200", "ready"), ("503", "compiling, or stopped"))}}}},
        "/metrics": {"get": {"operationId": "metrics", "summary": "Counts in Prometheus' format", "responses": {
            **refusals, "200": _answer("counts", {"type": "string"}, "text/plain")}}}}
