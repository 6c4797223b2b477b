"""comfyui_w4a8: ComfyUI's `asym_w4a8_int8`, which stock ComfyUI reads without custom nodes.

Every quantized linear rotates its input by the regular Hadamard matrix of 256, rounds it to int8 with one scale per
token, and multiplies it with weights of 4 bits (formats/asym_w4a8.py). A file has nothing else to say: no smoothing, no
mean, no branch, no clip. comfy-kitchen 0.2.40, tensor/w4a8_int8.py.
"""

from stepquant.targets.description import Target

COMFYUI_W4A8 = Target(
    name="comfyui_w4a8",
    program="ComfyUI (asym_w4a8_int8)",
    formats=(("asym_w4a8", "int8_row"),),
    hadamard="regular",
    hadamard_sizes=(256,),
    smoothing=False,
    means=False,
    branch=False,
    clip=False,
)
