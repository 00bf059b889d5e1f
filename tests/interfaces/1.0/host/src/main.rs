//! Opens a plugin as a host of interface 1.0 does, and says what came of it.

use std::path::Path;
use std::process::ExitCode;

use machinery::host::Plugin;

fn main() -> ExitCode {
    let file = std::env::args_os().nth(1).unwrap_or_default();
    match Plugin::open(Path::new(&file)) {
        Ok(plugin) => {
            println!("{} of interface {}", plugin.name(), plugin.interface());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}
