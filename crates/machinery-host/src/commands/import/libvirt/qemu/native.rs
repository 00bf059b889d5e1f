//! Translates libvirt's command line of a domain into the arguments of a machine.
//!
//! The guest's devices, their addresses and the order of all options stay, so that the snapshot loads. Everything that
//! connects the guest with libvirt or this computer is left out or replaced:
//!
//! | libvirt's | the machine's |
//! | --- | --- |
//! | monitor, secrets, `-S`, `-no-shutdown`, `-sandbox`, screen, RAM as an object | none: they are the machinery's |
//! | the file of a disk | the placeholder, or the name in the machine's folder |
//! | the chain below a disk | none: it is in the file |
//! | a tap that libvirt has made | the bridge, or user networking |
//! | a serial port or channel | a log in the machine's folder, if it was a file, or nothing |
//! | sound | no sound of this computer |

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Options that are left out.
const LEFT_OUT: [&str; 12] = [
    "-S",
    "-no-shutdown",
    "-name",
    "-sandbox",
    "-msg",
    "-mon",
    "-vnc",
    "-spice",
    "-display",
    "-D",
    "-incoming",
    "-pidfile",
];
/// Options whose value is a file that QEMU reads.
const READ: [&str; 4] = ["-kernel", "-initrd", "-dtb", "-bios"];
/// The files that a machine may read where they are.
const SYSTEM: &str = "/usr/";
/// libvirt's own monitor.
const MONITOR: &str = "charmonitor";

/// The things that the machine has in other places than the domain.
pub struct Places {
    /// The names of the domain's images: the placeholder, or a name in the machine's folder.
    pub images: HashMap<PathBuf, String>,
    /// The networks of the cards, by their MAC addresses: the value of `-netdev` without its id.
    pub networks: HashMap<String, String>,
}

/// The arguments of a machine.
#[derive(Debug, Default)]
pub struct Translated {
    pub arguments: Vec<String>,
    /// The further files that belong into the machine's folder, with their names there.
    pub files: Vec<(PathBuf, String)>,
}

/// An option, with its value if it has one.
struct Given {
    name: String,
    value: String,
}

/// Translates libvirt's command line. The error is the reason why it cannot be translated.
///
/// # Errors
/// The line is none of a QEMU, or connects a network card in a way that a machine cannot.
pub fn translate(line: &str, places: &Places) -> Result<Translated, String> {
    let words = shlex::split(line.trim()).ok_or("libvirt's translation has an open quote")?;
    let is_variable =
        |word: &String| word.split_once('=').is_some_and(|(name, _)| !name.contains(['/', '-']));
    let given = options(words.into_iter().skip_while(is_variable).skip(1));
    let nodes = Nodes::of(&given);
    let ram = values(&given, "-machine").find_map(|value| field(value, "memory-backend"));
    let mut translated = Translated::default();
    for Given { name, value } in &given {
        let value = match name.as_str() {
            name if LEFT_OUT.contains(&name) => continue,
            "-action" if value.contains("shutdown=pause") => continue,
            "-chardev" if field(value, "id").as_deref() == Some(MONITOR) => continue,
            "-object" if is_of_libvirt(value, ram.as_deref()) => continue,
            "-machine" => without(value, "memory-backend"),
            "-chardev" => character(value),
            "-audiodev" => format!("none,id={}", field(value, "id").unwrap_or_default()),
            "-netdev" => netdev(value, &given, places)?,
            "-blockdev" => match nodes.node(value) {
                Some(node) => translated.block(node, places)?,
                None => continue,
            },
            name if READ.contains(&name) => translated.file(value),
            _ => value.clone(),
        };
        translated.arguments.push(name.clone());
        translated.arguments.extend(Some(value).filter(|value| !value.is_empty()));
    }
    translated.arguments.extend(["-display", "none"].map(str::to_owned));
    Ok(translated)
}

/// Sorts the words into options and their values. An option is followed by its value, or by the next option.
fn options(words: impl Iterator<Item = String>) -> Vec<Given> {
    let mut given: Vec<Given> = Vec::new();
    for word in words {
        match given.last_mut() {
            Some(last) if last.value.is_empty() && !word.starts_with('-') => last.value = word,
            _ => given.push(Given { name: word, value: String::new() }),
        }
    }
    given
}

fn values<'a>(given: &'a [Given], name: &'a str) -> impl Iterator<Item = &'a str> {
    given.iter().filter(move |option| option.name == name).map(|option| option.value.as_str())
}

/// Returns a key of a value, which is JSON or has the form `a=b,c=d`.
fn field(value: &str, key: &str) -> Option<String> {
    if let Ok(Value::Object(keys)) = serde_json::from_str(value) {
        return keys.get(key).and_then(Value::as_str).map(str::to_owned);
    }
    value.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
}

/// Returns the value without a key.
fn without(value: &str, key: &str) -> String {
    let is_other = |part: &&str| part.split('=').next() != Some(key);
    value.split(',').filter(is_other).collect::<Vec<_>>().join(",")
}

/// Reports whether an object is the key of libvirt's secrets, or the RAM, which a template replaces.
fn is_of_libvirt(object: &str, ram: Option<&str>) -> bool {
    let id = field(object, "id");
    let is_secret = field(object, "qom-type").as_deref() == Some("secret") || object.starts_with("secret,");
    is_secret || id.is_some() && id.as_deref() == ram
}

fn character(value: &str) -> String {
    let id = field(value, "id").unwrap_or_default();
    // A name of its own, because clones have the same folder.
    if value.starts_with("file,") {
        format!("file,id={id},path=%MACHINE%-{id}.log")
    } else {
        format!("null,id={id}")
    }
}

/// Returns the network of a card whose tap libvirt would make, and any other network as it is.
fn netdev(value: &str, given: &[Given], places: &Places) -> Result<String, String> {
    let of_libvirt = ["fd", "fds", "vhostfd", "vhostfds"].iter().any(|key| field(value, key).is_some());
    if !of_libvirt {
        return Ok(value.to_owned());
    }
    let id = field(value, "id").unwrap_or_default();
    let is_card = |device: &&str| field(device, "netdev").as_deref() == Some(&id);
    let mac = values(given, "-device").find(is_card).and_then(|device| field(device, "mac"));
    let network = mac.as_ref().and_then(|mac| places.networks.get(&mac.to_lowercase()));
    let network =
        network.ok_or_else(|| format!("the network {id} of its command line is that of no card"))?;
    Ok(format!("{network},id={id}"))
}

/// The block nodes that the machine needs: those of its devices, without the chains below them.
struct Nodes {
    needed: HashSet<String>,
}

impl Nodes {
    fn of(given: &[Given]) -> Nodes {
        let parsed = values(given, "-blockdev").filter_map(|value| serde_json::from_str(value).ok());
        let all: HashMap<String, Map<String, Value>> = parsed
            .filter_map(|node: Map<String, Value>| Some((node.get("node-name")?.as_str()?.to_owned(), node)))
            .collect();
        let of_devices = values(given, "-device").filter_map(|device| field(device, "drive"));
        let of_firmware = values(given, "-machine")
            .flat_map(|machine| ["pflash0", "pflash1"].map(|key| field(machine, key)))
            .flatten();
        let mut next: Vec<String> = of_devices.chain(of_firmware).collect();
        let mut needed = HashSet::new();
        while let Some(name) = next.pop() {
            let below = all.get(&name).and_then(|node| node.get("file")).and_then(Value::as_str);
            next.extend(below.filter(|_| !needed.contains(&name)).map(str::to_owned));
            needed.insert(name);
        }
        Nodes { needed }
    }

    /// Returns the node of this option, if the machine needs it.
    fn node(&self, value: &str) -> Option<Map<String, Value>> {
        let mut node: Map<String, Value> = serde_json::from_str(value).ok()?;
        node.remove("backing");
        let name = node.get("node-name").and_then(Value::as_str)?;
        self.needed.contains(name).then_some(node)
    }
}

impl Translated {
    /// Returns the option of a block node, whose file is in the machine's folder.
    fn block(&mut self, mut node: Map<String, Value>, places: &Places) -> Result<String, String> {
        if let Some(Value::String(path)) = node.get("filename").cloned() {
            let known = places.images.get(Path::new(&path));
            let name = known.cloned().unwrap_or_else(|| self.file(&path));
            node.insert("filename".to_owned(), name.into());
        } else if !node.get("file").is_some_and(Value::is_string) {
            return Err(format!("its block node {} is no file", Value::Object(node)));
        }
        Ok(Value::Object(node).to_string())
    }

    /// Returns the name of a file that the machine reads, which belongs into its folder unless the system has it.
    fn file(&mut self, path: &str) -> String {
        if path.starts_with(SYSTEM) {
            return path.to_owned();
        }
        if let Some((_, name)) = self.files.iter().find(|(known, _)| known == Path::new(path)) {
            return name.clone();
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-+".contains(c) { c } else { '_' };
        let base = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{}-{}", self.files.len() + 1, base.chars().map(plain).collect::<String>());
        self.files.push((path.into(), name.clone()));
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            images: HashMap::from([
                ("/d/a.qcow2".into(), "%DISPOSABLE_DISK_PATH%".to_owned()),
                ("/d/b.qcow2".into(), "disk-2.qcow2".to_owned()),
            ]),
            networks: HashMap::from([("52:54:00:aa:00:01".to_owned(), "bridge,br=br7".to_owned())]),
        }
    }

    fn arguments(line: &str) -> String {
        translate(&format!("LC_ALL=C PATH=/bin /usr/bin/qemu {line}"), &places()).unwrap().arguments.join(" ")
    }

    #[test]
    fn parts_of_libvirt_are_left_out_and_the_guests_devices_stay() {
        let line = "-name guest=m,debug-threads=on -S -object '{\"qom-type\":\"secret\",\"id\":\"masterKey0\"}' \
                    -machine pc-q35-7.2,usb=off,memory-backend=pc.ram -m 32 \
                    -object '{\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\",\"size\":1}' \
                    -object '{\"qom-type\":\"rng-random\",\"id\":\"r\"}' -nodefaults \
                    -chardev socket,id=charmonitor,path=/m -mon chardev=charmonitor,mode=control -no-shutdown \
                    -device '{\"driver\":\"VGA\",\"addr\":\"0x2\"}' -vnc 127.0.0.1:0 -sandbox on -msg timestamp=on";
        assert_eq!(
            arguments(line),
            "-machine pc-q35-7.2,usb=off -m 32 -object {\"qom-type\":\"rng-random\",\"id\":\"r\"} -nodefaults \
             -device {\"driver\":\"VGA\",\"addr\":\"0x2\"} -display none"
        );
    }

    #[test]
    fn disks_are_those_of_the_machine_without_the_chains_below_them() {
        let node = |name: &str, file: &str| {
            format!(
                "-blockdev '{{\"driver\":\"file\",\"filename\":\"{file}\",\"node-name\":\"{name}-storage\"}}' \
                 -blockdev '{{\"node-name\":\"{name}\",\"driver\":\"qcow2\",\"file\":\"{name}-storage\",\"backing\":\"base\"}}' "
            )
        };
        let line = node("one", "/d/a.qcow2")
            + &node("two", "/d/b.qcow2")
            + &node("base", "/d/base.qcow2")
            + "-device '{\"driver\":\"ide-hd\",\"drive\":\"one\"}' -device virtio-blk-pci,drive=two";
        let found = arguments(&line);
        assert!(found.contains("\"filename\":\"%DISPOSABLE_DISK_PATH%\""), "{found}");
        assert!(found.contains("\"filename\":\"disk-2.qcow2\""), "{found}");
        assert!(!found.contains("base"), "{found}");
    }

    #[test]
    fn other_files_belong_into_the_folder_unless_the_system_has_them() {
        let line = "/usr/bin/qemu -kernel '/boot dir/vmlinuz' -initrd /boot/initrd -bios /usr/share/OVMF.fd \
                    -blockdev '{\"driver\":\"file\",\"filename\":\"/iso/cd.iso\",\"node-name\":\"cd\",\"read-only\":true}' \
                    -device ide-cd,drive=cd";
        let translated = translate(line, &places()).unwrap();
        let names: Vec<_> = translated.files.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["1-vmlinuz", "2-initrd", "3-cd.iso"]);
        let all = translated.arguments.join(" ");
        assert!(all.contains("-kernel 1-vmlinuz") && all.contains("/usr/share/OVMF.fd"), "{all}");
        assert!(all.contains("\"filename\":\"3-cd.iso\""), "{all}");
    }

    #[test]
    fn network_is_the_bridge_of_the_card() {
        let device = "-device '{\"driver\":\"e1000\",\"netdev\":\"hostnet0\",\"mac\":\"52:54:00:AA:00:01\"}'";
        let line = format!("-netdev '{{\"type\":\"tap\",\"fd\":\"25\",\"id\":\"hostnet0\"}}' {device}");
        assert!(arguments(&line).starts_with("-netdev bridge,br=br7,id=hostnet0 "));
        assert!(
            arguments("-netdev user,id=net0,restrict=on").starts_with("-netdev user,id=net0,restrict=on ")
        );
        let other = line.replace("AA:00:01", "AA:00:09");
        assert!(translate(&format!("/q {other}"), &places()).is_err());
    }

    #[test]
    fn ports_and_sound_are_connected_with_nothing_of_the_computer() {
        let line = "-chardev file,id=charserial0,path=/var/log/x,append=on -chardev pty,id=charserial1 \
                    -chardev socket,id=charchannel0,path=/s,server=on -audiodev '{\"id\":\"audio1\",\"driver\":\"spice\"}'";
        assert_eq!(
            arguments(line),
            "-chardev file,id=charserial0,path=%MACHINE%-charserial0.log -chardev null,id=charserial1 \
             -chardev null,id=charchannel0 -audiodev none,id=audio1 -display none"
        );
        assert!(translate("-machine 'pc", &places()).is_err());
    }
}
