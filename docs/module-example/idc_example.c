// SPDX-License-Identifier: GPL-2.0
/*
 * A driver for ivshmem devices (QEMU's docs/specs/ivshmem-spec), to start your own from.
 *
 * It maps the shared memory (BAR 2), takes the MSI-X vectors, and gives each device a file /dev/ivshmemN with read,
 * write, mmap, poll and the requests of idc_example.h. The table of devices is empty on purpose: the driver takes only
 * what it is given by driver_override, so that it can live beside VFIO (docs/own-module.md).
 */
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/poll.h>

#include "idc_example.h"

enum { BAR_REGISTERS = 0, BAR_MEMORY = 2, IV_POSITION = 8, DOORBELL = 12, MOST_VECTORS = 64 };

struct vector {
	struct example *ex;
	atomic_t count; /* doorbells not taken yet */
};

struct example {
	struct miscdevice misc;
	char name[16];
	int number;
	struct kref refs;          /* the bound device, and each open file */
	struct rw_semaphore alive; /* held for reading while the hardware is touched */
	bool gone;                 /* unplugged or unbound; files may still be open */
	struct address_space *mapping;
	struct pci_dev *pdev;
	void __iomem *registers;
	void *memory;
	resource_size_t size;
	wait_queue_head_t rung;
	int vectors;
	struct vector vector[MOST_VECTORS];
};

static DEFINE_IDA(numbers);

static void example_free(struct kref *refs)
{
	kfree(container_of(refs, struct example, refs));
}

static irqreturn_t example_interrupt(int irq, void *data)
{
	struct vector *vector = data;

	atomic_inc(&vector->count);
	wake_up_interruptible(&vector->ex->rung);
	return IRQ_HANDLED;
}

/* misc_open() calls this under the lock that misc_deregister() takes: the device is bound. */
static int example_open(struct inode *inode, struct file *file)
{
	struct example *ex = container_of(file->private_data, struct example, misc);

	kref_get(&ex->refs);
	ex->mapping = file->f_mapping;
	file->private_data = ex;
	return 0;
}

static int example_release(struct inode *inode, struct file *file)
{
	struct example *ex = file->private_data;

	kref_put(&ex->refs, example_free);
	return 0;
}

static ssize_t example_read(struct file *file, char __user *to, size_t n, loff_t *pos)
{
	struct example *ex = file->private_data;
	ssize_t done = -ENODEV;

	down_read(&ex->alive);
	if (!ex->gone)
		done = simple_read_from_buffer(to, n, pos, ex->memory, ex->size);
	up_read(&ex->alive);
	return done;
}

static ssize_t example_write(struct file *file, const char __user *from, size_t n, loff_t *pos)
{
	struct example *ex = file->private_data;
	ssize_t done = -ENODEV;

	down_read(&ex->alive);
	if (!ex->gone)
		done = simple_write_to_buffer(ex->memory, ex->size, pos, from, n);
	up_read(&ex->alive);
	return done;
}

/* Cached, unlike VFIO's mapping: the memory is ordinary RAM of the host. */
static int example_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct example *ex = file->private_data;
	int rc = -ENODEV;

	down_read(&ex->alive);
	if (!ex->gone)
		rc = vm_iomap_memory(vma, pci_resource_start(ex->pdev, BAR_MEMORY), ex->size);
	up_read(&ex->alive);
	return rc;
}

static __poll_t example_poll(struct file *file, poll_table *table)
{
	struct example *ex = file->private_data;

	poll_wait(file, &ex->rung, table);
	if (READ_ONCE(ex->gone))
		return EPOLLHUP | EPOLLERR;
	for (int i = 0; i < ex->vectors; i++)
		if (atomic_read(&ex->vector[i].count) > 0)
			return EPOLLIN | EPOLLRDNORM;
	return 0;
}

static long example_request(struct example *ex, unsigned int request, unsigned long arg)
{
	struct idc_example_info info = { .vectors = ex->vectors, .size = ex->size };

	switch (request) {
	case IDC_EXAMPLE_INFO:
		info.id = ioread32(ex->registers + IV_POSITION);
		return copy_to_user((void __user *)arg, &info, sizeof(info)) ? -EFAULT : 0;
	case IDC_EXAMPLE_RING:
		/* Orders what the caller stored in the region before the doorbell; on x86 it is in iowrite32 anyway. */
		mb();
		iowrite32(arg, ex->registers + DOORBELL);
		return 0;
	case IDC_EXAMPLE_TAKE:
		return arg < ex->vectors ? atomic_xchg(&ex->vector[arg].count, 0) : -EINVAL;
	}
	return -ENOTTY;
}

static long example_ioctl(struct file *file, unsigned int request, unsigned long arg)
{
	struct example *ex = file->private_data;
	long rc = -ENODEV;

	down_read(&ex->alive);
	if (!ex->gone)
		rc = example_request(ex, request, arg);
	up_read(&ex->alive);
	return rc;
}

static const struct file_operations example_files = {
	.owner = THIS_MODULE,
	.open = example_open,
	.release = example_release,
	.read = example_read,
	.write = example_write,
	.llseek = default_llseek,
	.mmap = example_mmap,
	.poll = example_poll,
	.unlocked_ioctl = example_ioctl,
};

/* None is fine: a read-only member is an ivshmem-plain device, which has no MSI-X. */
static int example_take_vectors(struct example *ex)
{
	int have = pci_msix_vec_count(ex->pdev), n;

	if (have <= 0)
		return 0;
	n = pci_alloc_irq_vectors(ex->pdev, 1, min_t(int, have, MOST_VECTORS), PCI_IRQ_MSIX);
	for (int i = 0; i < n; i++) {
		int rc = request_irq(pci_irq_vector(ex->pdev, i), example_interrupt, 0, ex->name, &ex->vector[i]);

		if (rc != 0) {
			while (--i >= 0)
				free_irq(pci_irq_vector(ex->pdev, i), &ex->vector[i]);
			pci_free_irq_vectors(ex->pdev);
			return rc;
		}
		ex->vectors = i + 1;
	}
	return n < 0 ? n : 0;
}

static void example_give_vectors(struct example *ex)
{
	for (int i = 0; i < ex->vectors; i++)
		free_irq(pci_irq_vector(ex->pdev, i), &ex->vector[i]);
	pci_free_irq_vectors(ex->pdev);
}

static int example_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct example *ex = kzalloc(sizeof(*ex), GFP_KERNEL);
	int rc;

	if (ex == NULL)
		return -ENOMEM;
	kref_init(&ex->refs);
	init_rwsem(&ex->alive);
	init_waitqueue_head(&ex->rung);
	ex->pdev = pdev;
	for (int i = 0; i < MOST_VECTORS; i++)
		ex->vector[i].ex = ex;
	ex->number = rc = ida_alloc(&numbers, GFP_KERNEL);
	if (rc < 0)
		goto free;
	snprintf(ex->name, sizeof(ex->name), "ivshmem%d", ex->number);
	/* What begins with pcim_ or devm_ is undone by the kernel when the driver is unbound. */
	rc = pcim_enable_device(pdev);
	if (rc == 0)
		rc = pcim_iomap_regions(pdev, BIT(BAR_REGISTERS), ex->name);
	if (rc != 0)
		goto number;
	ex->registers = pcim_iomap_table(pdev)[BAR_REGISTERS];
	ex->size = pci_resource_len(pdev, BAR_MEMORY);
	ex->memory = devm_memremap(&pdev->dev, pci_resource_start(pdev, BAR_MEMORY), ex->size, MEMREMAP_WB);
	if (IS_ERR(ex->memory)) {
		rc = PTR_ERR(ex->memory);
		goto number;
	}
	pci_set_master(pdev); /* MSI-X messages are writes by the device */
	rc = example_take_vectors(ex);
	if (rc != 0)
		goto number;
	ex->misc = (struct miscdevice){ .minor = MISC_DYNAMIC_MINOR, .name = ex->name, .fops = &example_files,
					.parent = &pdev->dev };
	pci_set_drvdata(pdev, ex);
	rc = misc_register(&ex->misc);
	if (rc != 0)
		goto vectors;
	dev_info(&pdev->dev, "%s: %llu bytes, %d vectors\n", ex->name, (u64)ex->size, ex->vectors);
	return 0;
vectors:
	example_give_vectors(ex);
number:
	ida_free(&numbers, ex->number);
free:
	kref_put(&ex->refs, example_free);
	return rc;
}

static void example_remove(struct pci_dev *pdev)
{
	struct example *ex = pci_get_drvdata(pdev);

	misc_deregister(&ex->misc);
	down_write(&ex->alive); /* after this nobody touches the hardware */
	ex->gone = true;
	up_write(&ex->alive);
	if (ex->mapping != NULL) /* who still has it mapped gets SIGBUS */
		unmap_mapping_range(ex->mapping, 0, 0, 1);
	wake_up_interruptible(&ex->rung);
	example_give_vectors(ex);
	ida_free(&numbers, ex->number);
	kref_put(&ex->refs, example_free);
}

static const struct pci_device_id example_ids[] = { { } };

static struct pci_driver example_driver = {
	.name = "idc_example",
	.id_table = example_ids,
	.probe = example_probe,
	.remove = example_remove,
};
module_pci_driver(example_driver);

MODULE_DESCRIPTION("ivshmem devices as files, an example to start from");
MODULE_LICENSE("GPL");
