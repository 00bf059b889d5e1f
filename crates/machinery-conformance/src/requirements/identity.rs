//! A machinery's name, machines, capabilities and configuration.

use std::collections::HashSet;
use std::path::PathBuf;

use machinery::host::Instance;
use machinery::{DumpFormat, ErrorKind, Level, MachineInfo};

use crate::call::{Call, Outcome};
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;

pub fn identity(session: &Session) -> Result {
    let plugin = &session.plugin().plugin;
    let file = plugin.path().file_name().unwrap_or_default().to_string_lossy();
    let name = plugin.name();
    // Cargo replaces `-` with `_` in library names.
    let names = [name.to_owned(), name.replace('-', "_")].map(|name| format!("libmachinery_{name}.so"));
    demand!(
        names.contains(&file.to_string()),
        "the file of the machinery {name:?} must be named after it, but its name is {file}"
    );
    demand!(is_lowercase(name), "the name {name:?} is not lowercase");
    demand!(!plugin.version().trim().is_empty(), "the plugin has no version");
    let version = session.call("version", Instance::version)?;
    demand!(!version.trim().is_empty(), "version returns an empty text");
    Ok(())
}

pub fn machines(session: &Session) -> Result {
    let infos = machine_infos(session)?;
    infos.iter().try_for_each(is_complete)?;
    is_unique("name", infos.iter().map(|info| info.name.as_str()))?;
    is_unique("ip", infos.iter().map(|info| info.ip.as_str()))?;
    // A label is unique in its hypervisor.
    let of_main = infos.iter().filter(|info| info.hypervisor.is_none());
    is_unique("label", of_main.map(|info| info.label.as_str()))?;
    // A machine in a network of its own may have the MAC address of another.
    let others = infos.iter().filter(|info| !info.own_network);
    is_unique("mac_address", others.filter_map(|info| info.mac_address.as_deref()))?;
    let expected: Vec<&str> = session.machines().collect();
    let names = infos.iter().map(|info| info.name.as_str());
    let found: Vec<&str> = names.filter(|name| expected.contains(name)).collect();
    demand!(found == expected, "the plugin must list the machines {expected:?} in this order, not {found:?}");
    // A run must not change the list.
    session.restore(session.machine())?;
    demand!(machine_infos(session)? == infos, "machines returns another list while a machine runs");
    Ok(())
}

pub fn capabilities(session: &Session) -> Result {
    let capabilities = session.capabilities()?;
    let machine = session.machine();
    session.restore(machine)?;
    demand!(session.capabilities()? == capabilities, "the capabilities change while a machine runs");
    for call in every_call(session.path("none")).iter().filter(|call| !call.is_offered(capabilities)) {
        session.is_refused(call, machine, ErrorKind::Unsupported)?;
        session.is_alive(machine)?;
    }
    session.no_file_at(&session.path("none"))
}

pub fn unknown_machine(session: &Session) -> Result {
    let capabilities = session.capabilities()?;
    let path = session.path("none");
    for call in every_call(path.clone()).iter().filter(|call| call.is_offered(capabilities)) {
        for name in ["no-such-machine", "", "../../etc/passwd", "%s%n"] {
            session.is_refused(call, name, ErrorKind::NoSuchMachine)?;
        }
    }
    session.no_file_at(&path)
}

pub fn bad_configuration(session: &Session) -> Result {
    // A host never loads a machinery twice.
    session.shut_down()?;
    let mut setup = session.plugin().setup.clone();
    let file = setup.config.path.display().to_string();
    for text in ["machines: [unclosed", "just words", "no_such_key: 1"] {
        setup.config.text = text.to_owned();
        match session.plugin().load(&setup)? {
            Outcome::Success(_) => {
                return Err(CheckFailure::Failed(format!(
                    "load must refuse the configuration {text:?}, but it succeeded"
                )));
            }
            Outcome::Refusal(error) => {
                demand!(
                    error.kind() == ErrorKind::Configuration,
                    "load must refuse {text:?} with Configuration, but returned {error:?}"
                );
                demand!(error.to_string().contains(&file), "the error does not name {file}: {error}");
            }
        }
    }
    Ok(())
}

pub fn check(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    let plugin = session.plugin();
    let (opened, setup, recorder) = (plugin.plugin.clone(), plugin.setup.clone(), plugin.recorder.clone());
    let report = plugin.run("check", session.timeout(), move || opened.check(&setup, recorder))?;
    let report = report.map_err(|error| failed("check", &error))?;
    let problem = report.findings().iter().find(|finding| finding.level == Level::Problem);
    demand!(problem.is_none(), "check reports a problem with a configuration that works: {problem:?}");
    session.is_alive(machine)?;
    session.stop(machine)?;
    session.no_leftovers("after a check")
}

fn machine_infos(session: &Session) -> Result<Vec<MachineInfo>> {
    session.call("machines", |instance, _| instance.machines())
}

fn is_complete(info: &MachineInfo) -> Result {
    let name = &info.name;
    demand!(!name.trim().is_empty(), "a machine has no name: {info:?}");
    demand!(!info.ip.is_empty(), "the machine {name} has no IP address");
    demand!(
        !info.platform.is_empty() && is_lowercase(&info.platform),
        "the platform of {name} must be lowercase and not empty, but is {:?}",
        info.platform
    );
    demand!(
        !info.architecture.is_empty() && is_lowercase(&info.architecture),
        "the architecture of {name} must be lowercase and not empty, but is {:?}",
        info.architecture
    );
    demand!(info.agent_port > 0, "the agent of {name} has no port");
    Ok(())
}

fn is_unique<'a>(key: &str, values: impl Iterator<Item = &'a str>) -> Result {
    let mut seen = HashSet::new();
    let duplicate = values.into_iter().find(|value| !seen.insert(*value));
    demand!(duplicate.is_none(), "two machines have the same {key}: {duplicate:?}");
    Ok(())
}

fn is_lowercase(text: &str) -> bool {
    text == text.to_lowercase()
}

fn every_call(path: PathBuf) -> [Call; 8] {
    [
        Call::State,
        Call::RestoreStart,
        Call::NorestoreStart,
        Call::Stop,
        Call::AcpiStop,
        Call::DumpMemory(path.clone(), DumpFormat::Elf),
        Call::Screenshot(path),
        Call::Prepare,
    ]
}
