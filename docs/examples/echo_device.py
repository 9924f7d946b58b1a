"""The device of docs/device-class.md: what a front end sends comes back."""

from idc.device import BackDriver, DeviceClass, Option


class EchoBack(BackDriver):
    def transaction(self, endpoint, transaction):
        transaction.complete(transaction.parameters * self.device.options["times"])


class Echo(DeviceClass):
    name = "echo"
    options = {"times": Option(1, "how often it comes back", least=1, most=8)}
    back = EchoBack
