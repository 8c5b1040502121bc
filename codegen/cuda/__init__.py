"""What GPU kernels need beside their text: instructions, the compiler to machine code, an emulator on the CPU."""
