//! `cuckoo-machinery`; everything is in the library.

fn main() {
    machinery_host::cli::main()
}
