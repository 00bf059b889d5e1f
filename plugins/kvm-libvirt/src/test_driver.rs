//! Domains of libvirt's driver for tests, for unit tests. They are in the memory of this process, without a hypervisor
//! and without libvirtd. All tests of a process see the same domains, so each test names its own.

use virt::connect::Connect;
use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt_sys as sys;

pub const DSN: &str = "test:///default";

/// Connects to the driver.
pub fn connect() -> Connect {
    // libvirt writes errors to stderr by default.
    virt::error::clear_error_callback();
    Connect::open(Some(DSN)).unwrap()
}

/// A domain that is removed with this value.
pub struct TestDomain {
    pub connect: Connect,
    pub domain: Domain,
}

impl TestDomain {
    /// Defines a domain, which is off.
    pub fn new(name: &str) -> Self {
        Self::with("", "", name)
    }

    /// Defines a domain with these devices, which is off.
    pub fn with_devices(devices: &str, name: &str) -> Self {
        Self::with("", devices, name)
    }

    /// Defines a domain whose `os` and `devices` contain these elements, and which is off.
    pub fn with(os: &str, devices: &str, name: &str) -> Self {
        let connect = connect();
        let xml = format!(
            "<domain type='test'><name>{name}</name><memory unit='MiB'>8</memory><os><type>hvm</type>{os}</os>\
             <devices>{devices}</devices></domain>"
        );
        let domain = connect.define_domain_xml(&xml).unwrap();
        TestDomain { connect, domain }
    }

    /// Starts the domain; returns its id.
    pub fn start(&self) -> u32 {
        self.domain.create().unwrap();
        self.look_up().id().unwrap()
    }

    /// Looks the domain up again: libvirt stores the id in the object.
    pub fn look_up(&self) -> Domain {
        self.connect.lookup_domain_by_name(&self.domain.name().unwrap()).unwrap()
    }

    /// Takes an internal snapshot, which becomes the current one.
    pub fn take_snapshot(&self, name: &str) -> DomainSnapshot {
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        self.domain.create_snapshot_xml(&xml, 0).unwrap()
    }

    /// Takes a snapshot whose memory is in a file. The driver makes no such file.
    pub fn take_external_snapshot(&self, name: &str) -> DomainSnapshot {
        let memory = "<memory snapshot='external' file='/none/memory'/>";
        let xml = format!("<domainsnapshot><name>{name}</name>{memory}</domainsnapshot>");
        self.domain.create_snapshot_xml(&xml, 0).unwrap()
    }
}

impl Drop for TestDomain {
    fn drop(&mut self) {
        // It may be off.
        let _ = self.domain.destroy();
        let everything = sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE;
        let _ = self.domain.undefine_flags(everything);
    }
}
