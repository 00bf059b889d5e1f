//! An allocator that no other library's memory can be given back to: what it hands out begins a little
//! behind what the system gave it, and a mark stands before it. Memory of another allocator has no mark.

use std::alloc::{GlobalAlloc, Layout, System, handle_alloc_error};

pub struct Marked;

/// What stands before each piece of memory.
const MARK: u64 = 0x_656c_6465_7220_3130;
/// Room for the mark, at any alignment that this plugin asks for.
const BEFORE: usize = 4096;

fn outer(layout: Layout) -> Option<Layout> {
    let size = layout.size().checked_add(BEFORE)?;
    Layout::from_size_align(size, layout.align()).ok().filter(|layout| layout.align() <= BEFORE)
}

// SAFETY: every piece is `BEFORE` bytes into one that the system allocated for it, `BEFORE` is a multiple
// of every alignment that is accepted, and a piece is given back exactly as it was asked for.
unsafe impl GlobalAlloc for Marked {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(outer) = outer(layout) else { return std::ptr::null_mut() };
        // SAFETY: its size is not zero, for `BEFORE` is in it.
        let start = unsafe { System.alloc(outer) };
        if start.is_null() {
            return start;
        }
        // SAFETY: the mark lies in the `BEFORE` bytes, the piece behind them.
        unsafe {
            start.cast::<u64>().write_unaligned(MARK);
            start.add(BEFORE)
        }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        let Some(outer) = outer(layout) else { handle_alloc_error(layout) };
        // SAFETY: a piece of ours has `BEFORE` bytes before it that begin with the mark. With any other
        // this reads what is not ours to read, and the process ends here or just below: that is what
        // this allocator is for.
        unsafe {
            let start = piece.sub(BEFORE);
            if start.cast::<u64>().read_unaligned() != MARK {
                std::process::abort();
            }
            start.cast::<u64>().write_unaligned(0);
            System.dealloc(start, outer);
        }
    }
}
