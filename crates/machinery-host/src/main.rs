//! `cuckoo-machinery`; everything is in the library.

fn main() -> std::process::ExitCode {
    machinery_host::cli::main()
}
