//! A domain's description with an overlay in place of each disk that its guest can write to, and of the file with the
//! variables of its firmware.
//!
//! libvirt opens the files that the description names, and no other. So the description also names the disk below the
//! overlay: libvirt does not have to believe the header of the overlay. It describes a disk without a backing file by an
//! empty `<backingStore/>`. Left as it is, that means that the overlay has no base: the domain starts, and its guest
//! reads zeros. So what the description has as the disk's own backing store moves below the disk.
//!
//! The text is changed only at these places, and otherwise stays as libvirt wrote it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use roxmltree::Node;

use crate::description::{child, is_read_only, parse};

/// The label of a file whose owner libvirt does not change. libvirt gives it to the files below as well. Source:
/// libvirt's docs/formatdomain.rst, "Security label".
const KEPT_OWNER: &str = "<seclabel model='dac' relabel='no'/>";

/// A disk, and the overlay over it.
pub type Overlaid = (PathBuf, PathBuf);

/// The owner of the disks below the overlays during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// libvirt does not change it.
    Kept,
    /// libvirt gives the disks to QEMU's user if it is configured to do so, and does not give them back. The host does.
    Qemu,
}

/// Returns the description with these overlays.
///
/// # Errors
/// The text is no description of a domain with these disks.
pub fn overlaid(xml: &str, overlays: &[Overlaid], owner: Owner) -> Result<String> {
    let document = parse(xml, "domain")?;
    let devices = document.root_element().children().filter(|node| node.has_tag_name("devices"));
    let disks = devices.flat_map(|devices| devices.children()).filter(|node| node.has_tag_name("disk"));
    let mut edits = Vec::new();
    let mut left: Vec<&Overlaid> = overlays.iter().collect();
    for disk in disks.filter(|disk| !is_read_only(*disk)) {
        let Some(source) = child(disk, "source") else { continue };
        let file = source.attribute("file").map(Path::new);
        let Some(at) = left.iter().position(|(path, _)| Some(path.as_path()) == file) else { continue };
        edits.extend(edits_of(xml, disk, source, left.remove(at), owner)?);
    }
    let firmware = document.root_element().children().filter(|node| node.has_tag_name("os"));
    for nvram in firmware.filter_map(|os| child(os, "nvram")) {
        let Some((range, path)) = variables(nvram) else { continue };
        let Some(at) = left.iter().position(|(own, _)| own == Path::new(path)) else { continue };
        edits.push((range, attribute_text(&left.remove(at).1)?));
    }
    match left.first() {
        None => Ok(edited(xml, edits)),
        Some((disk, _)) => Err(Error::failed(format!("the description has no disk {}", disk.display()))),
    }
}

type Edit = (Range<usize>, String);

/// Returns the path of the file with the firmware's variables, and its place in the text.
fn variables<'a>(nvram: Node<'a, '_>) -> Option<(Range<usize>, &'a str)> {
    match child(nvram, "source") {
        Some(source) => {
            let file = source.attribute_node("file")?;
            Some((file.range_value(), file.value()))
        }
        None => Some((nvram.first_child()?.range(), nvram.text()?.trim())),
    }
}

fn edits_of(
    xml: &str,
    disk: Node,
    source: Node,
    (path, overlay): &Overlaid,
    owner: Owner,
) -> Result<Vec<Edit>> {
    let backing = child(disk, "backingStore").map(|backing| backing.range());
    let below = backing.clone().and_then(|range| xml.get(range)).unwrap_or_default();
    let label = if owner == Owner::Kept { KEPT_OWNER } else { "" };
    let (path, overlay) = (attribute_text(path)?, attribute_text(overlay)?);
    let text = format!(
        "<source file='{overlay}'/><backingStore type='file'><format type='qcow2'/>\
         <source file='{path}'>{label}</source>{below}</backingStore>"
    );
    let removed = backing.map(|range| (range, String::new()));
    Ok([(source.range(), text)].into_iter().chain(removed).collect())
}

fn edited(xml: &str, mut edits: Vec<Edit>) -> String {
    // The last one first: it does not move the others.
    edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
    let mut text = xml.to_owned();
    for (range, new) in edits {
        text.replace_range(range, &new);
    }
    text
}

/// Returns a path as the text of an attribute.
fn attribute_text(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| {
        Error::environment(format!("libvirt takes no path that is not UTF-8: {}", path.display()))
    })?;
    Ok(text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: &str = "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/a &amp; b'/>\
                        <backingStore/><target dev='vda'/></disk>";

    fn domain(devices: &str) -> String {
        format!(
            "<domain><metadata><disk><source file='/d/c'/></disk></metadata><devices>{devices}</devices></domain>"
        )
    }

    fn over(disk: &str) -> Overlaid {
        (disk.into(), format!("{disk}.o'v").into())
    }

    #[test]
    fn overlay_has_the_disk_below_it_and_the_disk_what_it_had() {
        let wanted = "<source file='/d/a &amp; b.o&apos;v'/><backingStore type='file'><format type='qcow2'/>\
                      <source file='/d/a &amp; b'></source><backingStore/></backingStore><target dev='vda'/>";
        let text = overlaid(&domain(DISK), &[over("/d/a & b")], Owner::Qemu).unwrap();
        assert_eq!(
            text,
            domain(&DISK.replace("<source file='/d/a &amp; b'/><backingStore/><target dev='vda'/>", wanted))
        );
        // libvirt then looks for the backing file of the disk itself.
        let unknown = DISK.replace("<backingStore/>", "");
        let text = overlaid(&domain(&unknown), &[over("/d/a & b")], Owner::Kept).unwrap();
        assert!(
            text.contains(&format!("<source file='/d/a &amp; b'>{KEPT_OWNER}</source></backingStore>")),
            "{text}"
        );
    }

    #[test]
    fn variables_of_the_firmware_get_their_overlay_in_both_spellings() {
        for nvram in ["<nvram format='qcow2'>V</nvram>", "<nvram><source file='V'/></nvram>"] {
            let xml = |path: &str| format!("<os>{}</os>", nvram.replace('V', path));
            let domain = |os: String| domain(DISK).replace("<devices>", &format!("{os}<devices>"));
            let overlays = [over("/d/a & b"), ("/d/v".into(), "/d/o".into())];
            let text = overlaid(&domain(xml("/d/v")), &overlays, Owner::Kept).unwrap();
            assert!(text.contains(&xml("/d/o")), "{text}");
        }
    }

    #[test]
    fn disk_gets_its_own_overlay_and_a_read_only_one_none() {
        let (second, cd) = (
            DISK.replace("a &amp; b", "c"),
            DISK.replace("a &amp; b", "cd").replace("<target", "<readonly/><target"),
        );
        let xml = domain(&format!("{cd}{DISK}\n{second}"));
        let text = overlaid(&xml, &[over("/d/c"), over("/d/a & b")], Owner::Kept).unwrap();
        assert!(
            text.contains(&cd) && text.starts_with("<domain><metadata><disk><source file='/d/c'/></disk>"),
            "{text}"
        );
        let at = |part: &str| text.find(part).unwrap();
        assert!(at("/d/a &amp; b.o") < at("/d/c.o"), "{text}");
        let error = overlaid(&xml, &[over("/d/cd")], Owner::Kept).unwrap_err().to_string();
        assert!(error.contains("no disk /d/cd"), "{error}");
    }
}
