//! `cuckoo-machinery-jail POLICY PROGRAM ARGS…` applies the policy, which is JSON, to itself and executes the program.
//! See the crate's documentation.

use std::ffi::OsString;
use std::process::ExitCode;

use machinery_jail::{PROGRAM, Policy, enter};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(policy), Some(program)) = (args.next(), args.next()) else {
        eprintln!("{PROGRAM}: usage: {PROGRAM} POLICY PROGRAM ARGS…");
        return ExitCode::from(2);
    };
    let error = match serde_json::from_slice::<Policy>(policy.as_encoded_bytes()) {
        Ok(policy) => enter(&policy, &program, &args.collect::<Vec<OsString>>()).to_string(),
        Err(error) => format!("the policy is wrong: {error}"),
    };
    eprintln!("{PROGRAM}: {error}");
    ExitCode::from(126)
}
