"""The ops: functions over tensors, one noun and one file each. This table is what `ling_kernels.<name>` offers."""

EXPORTS = {  # public name: the file below ops/ that holds it
    "rms_norm": "rms_norm",
    "route": "route",
}
