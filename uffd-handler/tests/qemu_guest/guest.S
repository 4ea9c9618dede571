# Guest of the QEMU test; see code.rs. Assemble: gcc -c -m32 guest.S && objcopy -O binary -j .text guest.o
.code16
.set BASE, 0xFFFF0000
.globl _start
_start:
start16:
  cli
  lgdtl %cs:(gdtr - _start)
  movl %cr0, %eax
  orb $1, %al
  movl %eax, %cr0
  ljmpl $8, $(BASE + (start32 - _start))
.code32
start32:
  movw $16, %ax
  movw %ax, %ds
  movw %ax, %ss
  movl $0x100000, %edi      # first page: 1 MiB
fill:
  movl %edi, %eax
  imull $0x9E3779B1, %eax, %eax
  movl %eax, 0x10(%edi)
  addl $0x1000, %edi
  cmpl $0x2000000, %edi     # 32 MiB
  jne fill
verify:
  movl $0x100000, %edi
1:
  movl %edi, %eax
  imull $0x9E3779B1, %eax, %eax
  cmpl 0x10(%edi), %eax
  jne bad
  addl $0x1000, %edi
  cmpl $0x2000000, %edi
  jne 1b
  movb $'K', %al
  outb %al, $0xe9
  jmp verify
bad:
  movb $'X', %al
  outb %al, $0xe9
  jmp verify
.align 8
gdt:
  .quad 0
  .quad 0x00cf9b000000ffff
  .quad 0x00cf93000000ffff
gdtr:
  .word 23
  .long BASE + (gdt - _start)
