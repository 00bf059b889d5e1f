//! The micro guest: a machine in one boot sector.
//!
//! It is up in a quarter of a second under TCG with 32 MiB. At each timer tick it counts, and prints the
//! count on COM1 as eight hex digits and CRLF, and in the middle of its screen. A restored machine continues
//! from the snapshot's count, a cold boot starts at 1. The power button turns it off. Between ticks it sleeps
//! in `hlt`.
//!
//! The compiler assembles it from the source below, for [`LOAD_ADDRESS`], where a PC's firmware loads a boot
//! sector. The power management ports are those that SeaBIOS gives to QEMU's `pc` machines (PM base 0x600):
//!
//! | port | register | used |
//! | --- | --- | --- |
//! | 0x600 | `PM1a_STS` | bit 8: the power button was pressed |
//! | 0x602 | `PM1a_EN` | bit 8: let the button set that bit |
//! | 0x604 | `PM1a_CNT` | 0x2000: enter soft-off (sleep type 0) |

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the micro guest is x86 code, put together by an x86 assembler: build the testkit for x86_64");

/// The address at which the firmware loads a boot sector.
pub const LOAD_ADDRESS: u64 = 0x7c00;

/// The eight bytes before the counter, which identify this guest in a memory dump.
pub const MAGIC: [u8; 8] = *b"MICROCNT";

/// The physical address of the counter, a little-endian 32-bit number.
pub const COUNTER_ADDRESS: u64 = LOAD_ADDRESS + 0x1f0;

/// The physical address of [`MAGIC`].
pub const MAGIC_ADDRESS: u64 = COUNTER_ADDRESS - MAGIC.len() as u64;

/// Returns the boot sector, the first sector of a disk.
pub fn boot_sector() -> [u8; 512] {
    // SAFETY: the assembly below defines this symbol as exactly 512 initialised bytes in a
    // read-only section (the assembler refuses to move back in `.org` if they were more).
    unsafe { machinery_testkit_micro_guest }
}

/// Returns the counter in a memory dump of this guest. The firmware's buffers have copies of the boot sector,
/// whose counters do not change.
pub fn counter_in(dump: &[u8]) -> Option<u32> {
    let after_magic = dump.windows(12).filter_map(|bytes| bytes.strip_prefix(&MAGIC));
    after_magic.filter_map(|count| Some(u32::from_le_bytes(count.try_into().ok()?))).max()
}

unsafe extern "C" {
    static machinery_testkit_micro_guest: [u8; 512];
}

std::arch::global_asm!(
    r#"
    .pushsection .rodata.machinery_testkit_micro_guest, "a"
    .globl machinery_testkit_micro_guest
    .hidden machinery_testkit_micro_guest
    .code16
machinery_testkit_micro_guest:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, {load}
    # The firmware leaves the screen in text mode, with 80 columns.
    mov ax, 0xb800
    mov es, ax
    cld

    mov dx, 0x602
    in ax, dx
    or ax, 0x100
    out dx, ax

.Lmicro_tick:
    sti
    hlt
    mov dx, 0x600
    in ax, dx
    test ax, 0x100
    jnz .Lmicro_off
    mov di, {counter}
    inc dword ptr [di]
    mov ebx, dword ptr [di]
    mov si, 8
    mov di, (12 * 80 + 36) * 2
.Lmicro_digit:
    rol ebx, 4
    mov al, bl
    and al, 0x0f
    # 0..15 to '0'..'F' without a branch.
    cmp al, 10
    sbb al, 0x69
    das
    mov ah, 0x0f
    stosw
    call .Lmicro_put
    dec si
    jnz .Lmicro_digit
    mov al, 13
    call .Lmicro_put
    mov al, 10
    call .Lmicro_put
    jmp .Lmicro_tick

.Lmicro_off:
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
    cli
    hlt

    # Sends AL to COM1. The wait for the transmitter is bounded: a port that nobody reads costs
    # characters, never the tick.
.Lmicro_put:
    mov ah, al
    mov cx, 1000
    mov dx, 0x3fd
.Lmicro_wait:
    in al, dx
    test al, 0x20
    loopz .Lmicro_wait
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    ret

    .org machinery_testkit_micro_guest + {counter} - {load} - 8
    .ascii "MICROCNT"
    .long 0
    .org machinery_testkit_micro_guest + 510
    .byte 0x55, 0xaa
    .code64
    .popsection
    "#,
    load = const LOAD_ADDRESS,
    counter = const COUNTER_ADDRESS,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_sector_has_signature_and_counter() {
        let sector = boot_sector();
        assert_eq!(sector[510..], [0x55, 0xaa]);
        let at = (MAGIC_ADDRESS - LOAD_ADDRESS) as usize;
        assert_eq!(sector[at..at + 8], MAGIC);
        assert_eq!(sector[at + 8..at + 12], [0; 4]);
        assert_eq!(sector.windows(8).filter(|bytes| **bytes == MAGIC).count(), 1);
    }
}
