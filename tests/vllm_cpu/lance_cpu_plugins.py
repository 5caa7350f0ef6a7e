"""The entry points of lance_cpu, which imports vllm_omni and so cannot be imported while that is looking for a
platform."""


def platform() -> str:
    return "lance_cpu.CpuPlatform"


def stand_ins() -> None:
    import lance_cpu

    lance_cpu.stand_ins()
