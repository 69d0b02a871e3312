"""Meshes, and the one table from what an array's axes mean to mesh axes.

    data       copies of the model, each on its own clips
    fsdp       clips too; parameters and optimizer state are sharded, and gathered layer by layer where they are used
    tensor     heads and hidden channels of each layer; the weights stay where they are; a VAE's rows
    sequence   tokens; within attention heads, or tokens too (nn/sequence_parallel.py); a VAE's rows

Code below names axes by what they mean; without a mesh, or on a mesh of one device, nothing happens. XLA does the
rest (jax.set_mesh), but for the attention kernels, which it cannot shard: those run in a shard_map over clips and
heads.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from starflow_jax import config as settings_of
from starflow_jax.config import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
TABLE: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # clips
    "tokens": ("sequence",),
    "heads": ("tensor", "sequence"),  # of activations within attention
    "rows": ("tensor", "sequence"),  # of a VAE's frames: whole where they do not divide
    "hidden": ("tensor",),  # channels that one layer's products make and the next ones sum
    "width": ("fsdp",),  # the model width, of parameters
    "features": ("fsdp",),  # of a control module, of which there may be any number: whole where they do not divide
    None: (),
}
# The trailing axes of parameters, and of the optimizer's arrays of the same names. All others are whole on every
# device, which only small ones may be.
PARAMETERS = {
    r"layers/layer/qkv/kernel": ("width", None, "hidden"),
    r"layers/layer/qkv/bias": (None, "hidden"),
    r"layers/layer/proj/kernel": ("hidden", "width"),
    r"layers/layer/mlp_in/kernel": ("width", "hidden"),
    r"layers/layer/mlp_in/bias": ("hidden",),
    r"layers/layer/mlp_out/kernel": ("hidden", "width"),
    r"layers/layer/(qkv|mlp_in)/(kernel/)?lora_a": ("width", None),
    r"layers/layer/(proj|mlp_out)/(kernel/)?lora_a": ("hidden", None),
    r"layers/layer/qkv/(kernel/)?lora_b": (None, None, "hidden"),
    r"layers/layer/mlp_in/(kernel/)?lora_b": (None, "hidden"),
    r"layers/layer/(proj|mlp_out)/(kernel/)?lora_b": (None, "width"),
    r"(deep|shallow_\d+|denoiser)/proj_(in|text)/kernel": (None, "width"),
    r"(deep|shallow_\d+|denoiser)/proj_out/kernel": ("width", None),
    r"text/.*": (),  # the encoder that is trained along with the flow
    # Over mesh.tensor only what makes queries, keys and values, which lie there by heads: the rest is small, and over
    # it would cost each layer an exchange of hidden states.
    r"control/layers/qkv/kernel": ("features", None, "hidden"),
    r"control/layers/out/kernel": (None, "width"),
    r"control/layers/hidden/kernel": ("width", None),
    r"control/layers/tokens/kernel": ("features", None),
    r"control/proj_(in|out)/(kernel|bias)": (),
    r"decoder/.*": (),  # a codec's, fine-tuned on noised latents
    r"discriminator(_optimizer)?/.*": (),  # which that is trained against
}
HOST = "pinned_host"  # JAX's name of memory that devices copy from directly
LARGEST_UNNAMED = 2**20  # bytes of a parameter that no pattern matches


def make_mesh(settings: settings_of.Mesh, devices: Any = None) -> Mesh:
    """A mesh of all devices, or those given. Raises UserError where the settings' product is another number."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(settings, len(devices))
    # Unlike jax.make_mesh, also where an axis of the mesh is only a part of one of the pod's.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(settings: settings_of.Mesh, devices: int) -> tuple[int, ...]:
    """Sizes of AXES; a 0 among the settings becomes what the others leave."""
    sizes = [getattr(settings, axis) for axis in AXES]
    rest = math.prod(size for size in sizes if size)
    if 0 in sizes:
        sizes[sizes.index(0)] = devices // rest
    if math.prod(sizes) != devices:
        axes = " x ".join(f"{axis}={getattr(settings, axis)}" for axis in AXES)
        raise UserError(f"mesh {axes}: does not divide {devices} devices; set config.mesh so that the product of "
                        "its axes is that number (a 0 takes what the others leave)")
    return tuple(sizes)


def check_model(model: settings_of.Model, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where the model's heads or widths do not divide over the mesh."""
    axes = TABLE["heads" if model.sequence_parallel == "ulysses" else "hidden"]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    named = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
    for name in ("deep_width", "shallow_width"):
        width = getattr(model, name)
        if (width // model.head_dim) % shards:
            helps = ", or set model.sequence_parallel=all_gather" if len(axes) > 1 else ""
            raise UserError(f"{named}: their product must divide the {width // model.head_dim} heads of "
                            f"model.{name}={width}{helps}")
        if width % mesh.shape["fsdp"]:
            raise UserError(f"mesh.fsdp={mesh.shape['fsdp']}: must divide model.{name}={width}")


def check_batch(field: str, size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where a batch does not divide over the mesh's clips."""
    parts = math.prod(mesh.shape[axis] for axis in TABLE["batch"])
    if size % parts:
        raise UserError(f"{field}={size}: must be a multiple of mesh.data x mesh.fsdp = {parts}")


def current_mesh() -> Mesh | None:
    """The mesh in force (jax.set_mesh), None where there is none or it has a single device."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array's axes. Raises ValueError where two of them want the same one."""
    named = [TABLE[axis] for axis in axes]
    used = [axis for part in named for axis in part]
    if len(used) != len(set(used)):
        raise ValueError(f"{axes}: two axes of one array want the same mesh axis ({', '.join(used)})")
    return PartitionSpec(*(part or None for part in named))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out over the current mesh as TABLE says; a batch or rows that do not divide stay whole, heads that do not
    are sharded over mesh.tensor alone."""
    if on_one_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec(_dividing(axes, x.shape, mesh))))


def on_one_device() -> bool:
    """Whether there is no mesh in force, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def tokens_sharded() -> bool:
    """Whether the current mesh shards sequences, which then should not be cut at odd places."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(mesh.shape[axis] for axis in TABLE["tokens"]) > 1


def token_padding(slots: int) -> int:
    """How many slots of padding let a sequence divide over the current mesh; XLA's own padding of uneven parts is not
    safe to differentiate through."""
    mesh = jax.sharding.get_abstract_mesh()
    return 0 if mesh.empty else -slots % math.prod(mesh.shape[axis] for axis in TABLE["tokens"])


def over_heads(attend: Callable, q_BSHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, past: Any,
               *whole: jax.Array) -> jax.Array:
    """attend(q, k, v, *whole, past=past), each device with the heads and clips of its own.

    past: (k, v, length), as kernels.attention takes them, or None; whole: what all devices have.
    """
    if on_one_device():
        return attend(q_BSHD, k_BSHD, v_BSHD, *whole, past=past)
    mesh = jax.sharding.get_abstract_mesh()
    array = spec(_dividing(("batch", None, "heads", None), q_BSHD.shape, mesh))
    batch, = _dividing(("batch",), q_BSHD.shape, mesh)
    past_specs = None
    if past is not None:
        cached = jax.tree.map_with_path(lambda path, _: _of_cache(parameter_name(path), array), past[:2])
        past_specs = (*cached, spec((batch,)) if np.ndim(past[2]) else PartitionSpec())
    sharded = jax.shard_map(
        lambda q, k, v, past, *whole: attend(q, k, v, *whole, past=past), check_vma=False, out_specs=array,
        in_specs=(array, array, array, past_specs, *[PartitionSpec() for _ in whole]))
    return sharded(q_BSHD, k_BSHD, v_BSHD, past, *whole)


def _of_cache(name: str, array: PartitionSpec) -> PartitionSpec:
    """Of what a layer's cached keys and values consist of. array: of (B, S, H, D)."""
    if name.endswith("layer"):
        return PartitionSpec()
    own = (array[0], array[2], None, None) if name.endswith("scale_BG1P") else tuple(array)
    return PartitionSpec(*((None, *own) if "stack" in name else own))


def over_tokens(attend: Callable, q_BSHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, *whole: jax.Array
                ) -> jax.Array:
    """attend(q, k, v, *whole), each device with the tokens, clips and mesh.tensor's share of the heads of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    array = spec(_dividing(("batch", "tokens", "hidden", None), q_BSHD.shape, mesh))
    sharded = jax.shard_map(attend, check_vma=False, out_specs=array,
                           in_specs=(array, array, array, *[PartitionSpec() for _ in whole]))
    return sharded(q_BSHD, k_BSHD, v_BSHD, *whole)


def _dividing(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
              ) -> tuple[str | None, ...]:
    """`axes` without those of batches, rows and features that do not divide over the mesh (a single video is whole
    everywhere), and with "hidden" for heads that do not."""
    instead = {"batch": None, "heads": "hidden", "rows": None, "features": None}
    return tuple(instead[axis] if axis in instead and size % math.prod(mesh.shape[part] for part in TABLE[axis])
                 else axis for axis, size in zip(axes, shape))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of parameters, of a training state or of anything with the same names. The scale
    of a quantized kernel, NAME/scale beside NAME/q, has the kernel's axes but for its input.

    Raises ValueError for an array of more than LARGEST_UNNAMED bytes that PARAMETERS says nothing of.
    """
    def of(path: Any, leaf: Any) -> NamedSharding:
        name = parameter_name(path)
        quantized = re.fullmatch(r"(.*/kernel)/(q|scale)", name)
        whole, part = quantized.groups() if quantized else (name, "")
        for pattern, axes in PARAMETERS.items():
            if re.search(f"(^|/){pattern}$", whole):
                axes = axes[1:] if part == "scale" else axes
                axes = _dividing(axes, leaf.shape[len(leaf.shape) - len(axes):], mesh)
                return NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - len(axes)), *spec(axes)))
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size > LARGEST_UNNAMED:
            raise ValueError(f"parameter {name}, {leaf.dtype}{list(leaf.shape)}: no pattern of sharding.PARAMETERS "
                             f"matches it, and {size / 2**20:.1f} MiB are too much for a copy on every device")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def layers_as(abstract_params: Any, dtype: Any) -> Any:
    """Shapes of parameters, the Transformer layers' matrices in the dtype that they are multiplied in: a model that is
    not trained needs them in no other."""
    def of(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        matrix = is_layer_matrix(parameter_name(path))
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding) if matrix else leaf

    return jax.tree_util.tree_map_with_path(of, abstract_params)


def is_layer_matrix(name: str) -> bool:
    """Whether the parameter of that name ("flow/deep/...") is a matrix of stacked layers, (L, in, ...)."""
    return re.search(r"(^|/)layers/\w+/\w+/kernel$", name) is not None


def parameter_name(path: Any) -> str:
    """The keys of a path of jax.tree_util, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of such a tree, as checkpoints are restored to and programs compiled for."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        tree, parameter_shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis counts clips."""
    return NamedSharding(mesh, spec(("batch",)))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Of an array that `constrain` lays out."""
    return NamedSharding(mesh, spec(_dividing(axes, shape, mesh.abstract_mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_process(mesh: Mesh) -> tuple[int, int]:
    """(which shard of each batch this process loads, of how many): processes that share clips load the same shard.

    Raises UserError where the processes' shards overlap without being the same.
    """
    parts: dict[int, set[int]] = {}
    clips = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    for part, devices in enumerate(clips):
        for device in devices:
            parts.setdefault(device.process_index, set()).add(part)
    distinct = sorted({tuple(sorted(of)) for of in parts.values()})
    runs = all(of == tuple(range(of[0], of[0] + len(distinct[0]))) for of in distinct)
    if sum(map(len, distinct)) != len(clips) or not runs:
        raise UserError(f"mesh {dict(mesh.shape)}: each process must hold whole shards of the batch; let tensor x "
                        "sequence divide, or be a multiple of, the devices of a process")
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's shard of a batch, a pytree of arrays by clip, as a part of the global arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def lay_out(batch: Any) -> Any:
    """A batch that every process holds all of, over the current mesh; as it is where there is none, or where its clips
    don't divide over it."""
    mesh = current_mesh()
    clips = {len(x) for x in jax.tree.leaves(batch)}
    if mesh is None or any(named_sharding(mesh, ("batch",), (size,)).is_fully_replicated for size in clips):
        return batch
    return jax.tree.map(lambda x: _from_whole(np.asarray(x), batch_sharding(mesh)), batch)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds all of, sharded over all devices along the first axis that divides; for a model
    that is not trained, whose layout matters for memory alone."""
    return jax.tree.map(lambda x: _from_whole(np.asarray(x), spread_sharding(np.shape(x), mesh)), tree)


def spread_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where `spread` puts an array of that shape."""
    axis = next((axis for axis, size in enumerate(shape) if size % mesh.size == 0), None)
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXES))


def _from_whole(x: np.ndarray, placed: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, placed, lambda index: x[index])


def to_host(tree: Any) -> Any:
    """Arrays in the hosts' memory, laid out as they were on the devices, which then have room for others."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), tree)


def is_on_host(x: Any) -> bool:
    """Whether `to_host` put an array there."""
    return isinstance(x, jax.Array) and x.sharding.memory_kind == HOST


def to_devices(tree: Any, after: Any = None) -> Any:
    """The arrays that `to_host` put away, copied back to their devices; others as they are. after: arrays that are made
    first where anything is copied, so that what they are made from makes room."""
    if not any(map(is_on_host, jax.tree.leaves(tree))):
        return tree
    jax.block_until_ready(after)
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")) if is_on_host(x) else x, tree)


def fetch(x: Any) -> np.ndarray:
    """The whole array on every process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = x if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def as_first_process_has_it(value: Any) -> Any:
    """What the first process passes, of what JSON can hold, on every process; what the others pass is dropped."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


def meet(what: str) -> None:
    """Wait until all processes have come to the same point, which `what` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def on_every_process(run: Callable, *args: Any) -> Any:
    """Run on the first process, then on the others, which find what the first one wrote."""
    first = jax.process_index() == 0
    if not first:
        multihost_utils.sync_global_devices(getattr(run, "__name__", "run"))
    result = run(*args)
    if first and jax.process_count() > 1:
        multihost_utils.sync_global_devices(getattr(run, "__name__", "run"))
    return result
