//! The program `cuckoo-machinery`. All its code is in the library.

fn main() {
    machinery_host::cli::main()
}
